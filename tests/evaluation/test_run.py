"""Evaluating a model: the files in their schema, the pictures as pictures, mistakes in plain words."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax import compiled
from clip_jax.api import Model
from clip_jax.config import ModelConfig
from clip_jax.data.sources import open_source
from clip_jax.errors import UserError
from clip_jax.evaluation import encode
from clip_jax.evaluation.run import evaluate
from clip_jax.models.clip import Definition
from clip_jax.models.variants import architecture
from clip_jax.weights.mapping import flatten

SCHEMA = ["dataset", "model", "pretrained", "task", "metrics", "language"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    definition = Definition(architecture(ModelConfig(variant="ViT-W64/4@16px")))
    weights = jax.jit(definition.init)(jax.random.key(0))
    return Model(
        definition,
        compiled.place(flatten(weights), definition),
        "ViT-W64/4@16px",
        "random",
        tmp_path_factory.mktemp("results"),
    )


@pytest.fixture(scope="module")
def digits(data_dir):
    return open_source("tfds:captioned_digits", data_dir=str(data_dir), default_split="test")


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


def test_classification_writes_a_result_and_two_pictures(model, digits, tmp_path, capsys):
    result = evaluate(model, digits, "zeroshot_classification", output=tmp_path / "new" / "result.json")
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert written == result
    assert list(written) == SCHEMA
    assert list(written["metrics"]) == ["acc1", "acc5", "mean_per_class_recall"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "result.json",
        "result_confusion.png",
        "result_matches.png",
    ]
    for picture in (tmp_path / "new").glob("*.png"):
        assert min(size_of(picture)) > 400
    assert "acc1" in capsys.readouterr().out


def test_retrieval_writes_a_result_and_a_picture(model, digits, tmp_path):
    result = evaluate(model, digits, "zeroshot_retrieval", output=tmp_path / "result.json")
    assert list(result) == SCHEMA
    assert list(result["metrics"]) == [f"{way}_retrieval_recall@{k}" for k in (1, 5, 10) for way in ("image", "text")]
    assert min(size_of(tmp_path / "result_matches.png")) > 400


def test_every_image_is_encoded_once_in_order_whatever_the_batch(model, digits, monkeypatch):
    whole = encode.encode_images(model, digits)
    monkeypatch.setattr(encode, "BATCH", 100)
    parts = encode.encode_images(model, digits)
    assert whole.labels == [digits[i].label for i in range(len(digits))]
    assert whole.captions == [digits[i].captions for i in range(len(digits))]
    assert whole.img_BE.shape == parts.img_BE.shape == (len(digits), 64)
    np.testing.assert_allclose(parts.img_BE, whole.img_BE, atol=1e-6)


def test_a_model_that_has_diverged_is_refused_instead_of_being_perfect(model, digits, tmp_path):
    placed = jax.tree.map(lambda x: x * np.nan, model.placed)
    diverged = dataclasses.replace(model, placed=placed, pretrained="runs/diverged")
    for task in ("zeroshot_classification", "zeroshot_retrieval"):
        with pytest.raises(UserError, match="runs/diverged gives embeddings that are not finite"):
            evaluate(diverged, digits, task, output=tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


def test_an_unknown_task_names_the_nearest_and_writes_nothing(model, digits, tmp_path):
    with pytest.raises(UserError, match="did you mean 'zeroshot_retrieval'"):
        evaluate(model, digits, "zero_shot_retrieval", output=tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


def test_what_another_process_cannot_read_is_not_encoded_here_either(model, digits, monkeypatch):
    monkeypatch.setattr(encode.distributed, "gather", lambda problem: [problem, "image 3 of other:test cannot be read"])
    monkeypatch.setattr(Model, "encode_image", lambda *_: pytest.fail("the devices would wait for each other"))
    with pytest.raises(UserError, match="image 3 of other:test cannot be read"):
        encode.encode_images(model, digits)
