"""`convert_weights.py` as a user runs it: files that open, a table of errors, mistakes in one line."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from oracles import openai_clip, require

import clip_jax
from clip_jax.architecture import Architecture, ResNetTower, TextTower, ViTTower
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.weights import openai, parity
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import flatten

ROOT = Path(__file__).parents[1]
TEXT = TextTower(context_length=77, vocab_size=49408, width=64, depth=2, num_heads=1, mlp_dim=256)
ARCHITECTURES = {
    "vit": Architecture(32, ViTTower(32, 16, width=64, depth=2, num_heads=1, mlp_dim=256), TEXT),
    "resnet": Architecture(32, ResNetTower(32, width=8, depths=(1, 2, 1, 1), num_heads=4), TEXT),
}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def source(request, tmp_path_factory) -> Path:
    """A file of OpenAI's, in float16 what it has in float16, and no part of it as it starts."""
    path = tmp_path_factory.mktemp("source") / f"{request.param}.pt"
    random = np.random.default_rng(0)

    def drawn(name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        around_one = name.endswith(("variance", "scale"))
        x = random.uniform(0.5, 1.5, like.shape) if around_one else 0.1 * random.normal(size=like.shape)
        half = name.endswith(("kernel", "projection")) or (name.endswith("bias") and "norm" not in name)
        return x.astype(np.int32 if like.dtype == np.int32 else np.float16 if half else np.float32)

    shapes = flatten(Definition(ARCHITECTURES[request.param]).shapes())
    arrays = {name: drawn(name, like) for name, like in shapes.items()}
    openai.write(path, Bundle(ARCHITECTURES[request.param], arrays, "small", "random"))
    return path


def convert(*args: str, script: tuple[str, ...] = ("convert_weights.py",)) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *script, *args],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_to_our_folder_and_back_is_bit_for_bit_and_checked_number_by_number(source, tmp_path):
    openai_clip()
    done = convert(f"--source={source}", "--format=clip_jax", f"--target={tmp_path / 'ours'}", "--check")
    assert done.returncode == 0, done.stderr
    for row in ("image block 1", "text block 1", "image features", "text features", "logits"):
        assert f"│ {row} " in done.stdout
    assert "NO" not in done.stdout
    done = convert(f"--source={tmp_path / 'ours'}", "--format=openai", f"--target={tmp_path / 'back.pt'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back.pt").read_bytes() == source.read_bytes()


def test_what_is_written_opens_in_openais_package_with_the_same_features(source, tmp_path):
    clip, torch = openai_clip(), require("torch")
    done = convert(f"--source={source}", "--format=openai", f"--target={tmp_path / 'theirs.pt'}")
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its own format deprecated
        theirs, _ = clip.load(str(tmp_path / "theirs.pt"), device="cpu")
    ours, _ = clip_jax.load(source)
    tokens = clip_jax.tokenize(["a diagram", "a dog"])
    with torch.no_grad():
        expected = theirs.encode_text(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(ours.encode_text(tokens), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_an_error_above_the_bar_ends_in_exit_code_1(source, tmp_path):
    openai_clip()
    stricter = "import runpy; from clip_jax.weights import parity; parity.BAR = 1e-12; "
    script = ("-c", stricter + "runpy.run_path('convert_weights.py', run_name='__main__')")
    done = convert(f"--source={source}", "--format=clip_jax", f"--target={tmp_path / 'x'}", "--check", script=script)
    assert done.returncode == 1, done.stderr
    assert "NO" in done.stdout
    assert "Traceback" not in done.stderr


def test_weights_that_differ_are_beyond_the_bar(source):
    openai_clip()
    original = openai.read(source, np.float32)
    changed = original.arrays | {"text/blocks/mlp/up/bias": original.arrays["text/blocks/mlp/up/bias"] + 1e-3}
    expected = parity.reference("openai", source, original.architecture)
    rows = parity.compare(Bundle(original.architecture, changed, "", ""), expected)
    wrong = {row.name for row in rows if not row.holds}
    assert wrong == {"text block 0", "text block 1", "text features", "logits"}


def test_a_trained_run_becomes_a_folder_that_loads_with_the_same_features(workdir, tmp_path):
    done = convert(f"--source={workdir}", "--format=clip_jax", f"--target={tmp_path / 'folder'}")
    assert done.returncode == 0, done.stderr
    tokens = clip_jax.tokenize(["a handwritten seven"])
    run, folder = (clip_jax.load(path)[0] for path in (workdir, tmp_path / "folder"))
    np.testing.assert_array_equal(folder.encode_text(tokens), run.encode_text(tokens))
    assert folder.name == run.name == "ViT-W64/4@16px"


def test_what_lies_half_way_to_a_fine_tuned_model_is_a_folder(workdir, tmp_path):
    folder = tmp_path / "zero_shot"
    assert convert(f"--source={workdir}", "--format=clip_jax", f"--target={folder}").returncode == 0
    args = (f"--source={workdir}", "--format=clip_jax", f"--target={tmp_path / 'between'}", f"--interpolate={folder}")
    assert "0.5 · " in convert(*args).stdout
    assert "0.25 · " in convert(*args, "--alpha=0.75").stdout
    done = convert(*args, "--alpha=1.5")
    assert done.returncode == 2
    assert "alpha=1.5 should be in [0, 1]" in done.stderr


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"source": "ViT-B/31"}, "none of the models that can be downloaded: RN50, RN101"),
        ({"format": "openia"}, "unknown format 'openia'; did you mean 'openai'?"),
        ({"format": None}, "--format is missing"),
        ({"source": "README.md"}, "neither a safetensors file nor one of PyTorch's"),
        ({}, "image.num_heads=1 for 4"),
        ({"alpha": 0.5}, "--alpha=0.5 goes with --interpolate=ZEROSHOT"),
        ({"interpolate": "ViT-B/31"}, "none of the models that can be downloaded"),
    ],
    ids=str,
)
def test_a_mistake_ends_in_one_line_and_exit_code_2_and_writes_nothing(changed, words, workdir, tmp_path):
    given = {"source": workdir, "format": "openai", "target": tmp_path / "model.pt"} | changed
    done = convert(*[f"--{name}={value}" for name, value in given.items() if value is not None])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not any(tmp_path.iterdir())


def test_the_check_without_pytorch_says_how_to_install_it(monkeypatch, source, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(clip_jax.errors.UserError, match="pip install torch clip-anytorch"):
        parity.reference("openai", source, openai.read(source).architecture)


def test_weights_that_are_not_finite_do_not_pass(source):
    assert not parity.Row("image features", float("nan"), float("nan")).holds


@pytest.mark.parametrize("peer", ["open_clip", "huggingface"])
def test_a_broken_package_that_the_check_needs_is_told_and_not_found_out_in_the_middle(peer, monkeypatch):
    def broken(name: str):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(parity.importlib, "import_module", broken)
    with pytest.raises(
        UserError, match=r"the check needs .* \(operator torchvision::nms does not exist\): pip install"
    ):
        parity.PEERS[peer].load_packages()
