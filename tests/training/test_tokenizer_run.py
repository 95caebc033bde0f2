"""A run whose tokenizer is in a file: it trains with that, keeps it, and is loaded with it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_tokenizers import BOS, EOS, PAD, UNK, WORDS, few_words

import clip_jax
from clip_jax.architecture import Architecture, TextTower, Tokenize, ViTTower
from clip_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from clip_jax.errors import UserError
from clip_jax.models import variants
from clip_jax.training.loop import train
from clip_jax.workdir import Workdir

SMALL = Architecture(
    embed_dim=8,
    image=ViTTower(16, 8, width=8, depth=1, num_heads=1, mlp_dim=8),
    text=TextTower(8, len(WORDS), width=8, depth=1, num_heads=1, mlp_dim=8, pool="eos", eos_id=EOS),
    tokenize=Tokenize("file", clean="lower", pad_id=PAD),
)


@pytest.fixture(autouse=True)
def small_variants(monkeypatch) -> None:
    monkeypatch.setitem(variants.VARIANTS, "small", SMALL)
    few = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, vocab_size=10))
    monkeypatch.setitem(variants.VARIANTS, "few words", few)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "words" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(few_words(), encoding="utf-8")
    return path


def config(data_dir: Path, file: Path | None, *, variant: str = "small", duration: str = "1 step") -> Config:
    return Config(
        model=ModelConfig(variant, tokenizer=None if file is None else str(file)),
        data=DataConfig(data_dir=str(data_dir), global_batch=4),
        optim=OptimConfig(warmup="0 steps"),
        duration=duration,
    )


def test_a_run_keeps_its_tokenizer_and_is_loaded_with_it(data_dir, file, tmp_path):
    workdir = tmp_path / "run"
    train(config(data_dir, file), workdir, devices=jax.devices()[:1])
    file.unlink()
    assert Workdir(workdir).tokenizer() == few_words()
    model, _ = clip_jax.load(workdir)
    tokens = model.tokenize(["A  dog", "the zebra"])
    assert tokens.tolist() == [[BOS, 4, 5, EOS, *[PAD] * 4], [BOS, 9, UNK, EOS, *[PAD] * 4]]
    assert np.isfinite(model.encode_text(tokens)).all()


@pytest.mark.parametrize(
    ("variant", "given", "message"),
    [
        ("small", None, r"small has its tokenizer in a file: set model\.tokenizer to its tokenizer\.json"),
        ("small", "nothing.json", r"nothing\.json cannot be read: No such file"),
        ("small", "damaged.json", "cannot be used"),
        ("few words", "tokenizer.json", "the tokenizer has 13 ids, and few words an embedding for 10 only"),
        ("ViT-W64/4@16px", "tokenizer.json", "ViT-W64/4@16px has CLIP's own tokenizer; leave it out"),
    ],
)
def test_a_tokenizer_that_does_not_go_with_the_variant_is_refused_before_anything_is_written(
    variant, given, message, data_dir, file, tmp_path
):
    (file.parent / "damaged.json").write_text("{}")
    path = None if given is None else file.parent / given
    with pytest.raises(UserError, match=message):
        train(config(data_dir, path, variant=variant), tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_needs_no_path_and_refuses_another_tokenizer(data_dir, file, tmp_path):
    folder, model = Workdir(tmp_path / "run"), config(data_dir, file).model
    folder.claim(config(data_dir, file), SMALL, folder.tokenizer_for(model, SMALL))
    nowhere = config(data_dir, None)
    folder.check(nowhere, SMALL)
    assert folder.tokenizer_for(nowhere.model, SMALL) == folder.tokenizer_for(model, SMALL) == few_words()
    file.write_text(few_words().replace('"dog"', '"fox"'), encoding="utf-8")
    with pytest.raises(UserError, match="is not the tokenizer of this run"):
        folder.tokenizer_for(model, SMALL)
