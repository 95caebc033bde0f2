"""The examples as a user runs them; and the page for those who come from OpenAI's package, run line by line."""

import dataclasses
import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cifar
from absl.testing import flagsaver
from oracles import openai_clip
from PIL import Image

import clip_jax
from clip_jax import command
from clip_jax.architecture import Architecture, TextTower, ViTTower
from clip_jax.models.clip import Definition
from clip_jax.tokenizer import EOT
from clip_jax.weights import openai
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.download import RELEASES, Release
from clip_jax.weights.mapping import flatten

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "coming_from_openai_clip.md"
NAME = "ViT-B/32"  # what the page loads

DIGITS = "tfds:captioned_digits"


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    """A small CLIP in a file of OpenAI's format, with weights of noise that float16 can hold."""
    arch = Architecture(
        embed_dim=24,
        image=ViTTower(image_size=16, patch_size=8, width=64, depth=2, num_heads=1, mlp_dim=256),
        text=TextTower(77, 49408, width=64, depth=2, num_heads=1, mlp_dim=256),
    )
    random = np.random.default_rng(0)
    arrays = {
        path: random.normal(np.log(100) if path == "logit_scale" else 0, 0.1, x.shape)
        .astype(np.float16)
        .astype(x.dtype)
        for path, x in flatten(Definition(arch).shapes()).items()
    }
    path = tmp_path_factory.mktemp("small") / "ViT-B-32.pt"
    openai.write(path, Bundle(arch, arrays, "small", "random"))
    return path


# --- the scripts ---


def run(script: str, *args: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, script, *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output_of(script: str, *args: str | Path) -> list[str]:
    done = run(f"examples/{script}.py", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_zero_shot_prints_the_five_likeliest_classes(workdir, data_dir):
    title, *lines = output_of(
        "zero_shot", f"--model={workdir}", f"--dataset={DIGITS}", f"--data_dir={data_dir}", "--index=7"
    )
    assert re.fullmatch(r"image 7 of captioned_digits:test, labelled '\w+':", title)
    found = [re.fullmatch(r" *(\w+) +([\d.]+) %", line) for line in lines]
    shares = [float(line[2]) for line in found]
    assert len({line[1] for line in found}) == 5
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) < 100.05


def test_zero_shot_counts_cifars_images_as_the_original_files_do(small_file, tmp_path):
    tiny_cifar.make(tmp_path)
    title, *lines = output_of(
        "zero_shot", f"--model={small_file}", "--dataset=tfds:cifar100:test", f"--data_dir={tmp_path}", "--index=37"
    )
    assert title == f"image 37 of cifar100:test, labelled 'class_{tiny_cifar.label_of(37)}':"
    assert len(lines) == 5


def test_linear_probe_learns_on_one_split_and_prints_the_accuracy_on_another(workdir, data_dir):
    (line,) = output_of("linear_probe", f"--model={workdir}", f"--dataset={DIGITS}", f"--data_dir={data_dir}")
    found = re.fullmatch(r"1,442 images to learn from, 355 to test: ([\d.]+) % right", line)
    assert float(found[1]) > 50  # the features of two steps of training, ten classes


def test_text_hidden_states_writes_the_states_that_generators_take(small_file, tmp_path):
    output = tmp_path / "new" / "states.npz"
    prompts = ["a lighthouse at dusk", ""]
    *_, path = output_of(
        "text_hidden_states",
        f"--model={small_file}",
        *(f"--prompt={prompt}" for prompt in prompts),
        f"--output={output}",
        "--pad_with_end",
    )
    assert path == str(output)
    assert list(output.parent.iterdir()) == [output]
    states = np.load(output)
    tokens = clip_jax.tokenize(prompts)
    ends = tokens.argmax(axis=1)
    for row, plain, end in zip(states["tokens"], tokens, ends, strict=True):
        np.testing.assert_array_equal(row[: end + 1], plain[: end + 1])
        assert set(row[end:]) == {EOT}
    arrays = openai.read(small_file).arrays
    raw, scale, bias = states["penultimate"], arrays["text/post_norm/scale"], arrays["text/post_norm/bias"]
    assert raw.shape == (2, 77, 64)
    normed = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(states["penultimate_normed"], normed, atol=1e-5)
    np.testing.assert_allclose(((states["final"] - bias) / scale).mean(-1), 0, atol=1e-4)
    assert not np.allclose(states["final"], states["penultimate_normed"], atol=1e-2)


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("zero_shot", ["--model=MODEL"], "--dataset is missing"),
        ("zero_shot", ["--model=MODEL", f"--dataset={DIGITS}", "--index=355"], "has the images 0 to 354"),
        ("zero_shot", ["--model=MODEL", "--dataset=tfds:cifar100"], "no data set 'cifar100'; there are: captioned_di"),
        ("linear_probe", ["--model=MODEL", f"--dataset={DIGITS}:test"], "has no split 'test:train'"),
        ("text_hidden_states", ["--model=nowhere", "--prompt=a", "--output=x.npz"], "'nowhere' is no file, no folder"),
        ("text_hidden_states", ["--model=MODEL", "--output=x.npz", f"--prompt={'a ' * 80}"], "is too long for context"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(script, args, words, small_file, data_dir):
    folder = [] if script == "text_hidden_states" else [f"--data_dir={data_dir}"]
    done = run(f"examples/{script}.py", *(arg.replace("MODEL", str(small_file)) for arg in args), *folder)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize("script", sorted(file.stem for file in (ROOT / "examples").glob("*.py")))
def test_help_says_what_the_header_says(script):
    done = run(f"examples/{script}.py", "--help")
    assert done.returncode == 0
    assert f"python examples/{script}.py --model=" in done.stdout


# --- the page ---


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is to be run next: a statement of each side, or a program of ours, or a command line."""

    kind: str  # "row", "python" or "sh"
    old: str
    new: str


def pieces() -> Iterator[Piece]:
    """Yields what the page has to run, top to bottom: cells that are code alone (a bare name is none), and blocks."""
    row = r"^\| (?P<old>.*?) ?\| (?P<new>.*) \|$"
    fence = r"^```(?P<kind>\w+)\n(?P<code>(?s:.*?))^```$"
    for found in re.finditer(f"{row}|{fence}", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        if found["kind"]:
            yield Piece(found["kind"], "", found["code"])
        else:
            old, new = (re.fullmatch(r"`([^`]*[ (][^`]*)`", found[side]) for side in ("old", "new"))
            yield Piece("row", old[1] if old else "", new[1] if new else "")


def convert(line: str) -> None:
    """Runs a line of the page that calls convert_weights.py, in this process."""
    import convert_weights

    python, script, *args = shlex.split(line)
    assert (python, script) == ("python", "convert_weights.py")
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(sys, "argv", [script, *args])
        command.run(convert_weights.main)


@pytest.fixture(scope="module")
def start(small_file, tmp_path_factory) -> Iterator[dict[str, Any]]:
    """What the page takes for granted: pictures, and the released file in the folder of OpenAI's cache."""
    home = tmp_path_factory.mktemp("home")
    content = small_file.read_bytes()
    (home / ".cache" / "clip").mkdir(parents=True)
    (home / ".cache" / "clip" / "ViT-B-32.pt").write_bytes(content)
    url = f"https://no.such.host.invalid/{hashlib.sha256(content).hexdigest()}/ViT-B-32.pt"
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (20, 30 + i, 3), np.uint8)) for i in range(6)]
    pictures[0].save(home / "CLIP.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.delenv("CLIP_JAX_CACHE", raising=False)
        patch.setitem(RELEASES, NAME, Release(url))
        patch.chdir(home)
        yield {"pictures": pictures, "labels": [0, 1, 2, 0, 1, 2], "url": url}


@pytest.fixture(scope="module")
def ours(start) -> dict[str, Any]:
    """The names that are set when the right column, the blocks and the command lines have been run."""
    names = dict(start)
    for piece in pieces():
        if piece.kind == "sh":
            for line in piece.new.splitlines():
                convert(line.removesuffix(" --check"))
        else:
            exec(piece.new, names)
    return names


def test_every_call_on_the_page_runs(ours):
    assert sum(bool(piece.old) for piece in pieces()) > 25, "the tables are not read any more"
    assert ours["names"] == clip_jax.available_models()
    assert (ours["size"], ours["context_length"], ours["vocab_size"]) == (16, 77, 49408)
    assert ours["probs"].shape == (1, 3)
    again = ours["again"] / np.linalg.norm(ours["again"], axis=-1, keepdims=True)
    np.testing.assert_allclose(again, ours["text_features"], atol=1e-6)
    assert ours["final"].shape == ours["penultimate"].shape == (5, 77, 64)


@pytest.mark.filterwarnings("ignore")  # of a package that is not ours
def test_the_left_column_runs_with_openais_package_and_gives_the_same_numbers(start, ours, monkeypatch):
    clip = openai_clip()
    import torch

    monkeypatch.setitem(clip.clip._MODELS, NAME, start["url"])
    theirs = dict(start)
    try:
        for piece in pieces():
            exec(piece.old, theirs)
    finally:
        torch.set_grad_enabled(True)
    for name in ("names", "size", "context_length", "vocab_size"):
        assert ours[name] == theirs[name], name
    for name in ("text", "indices"):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    np.testing.assert_allclose(ours["image"], theirs["image"].permute(0, 2, 3, 1), rtol=0, atol=1e-6)
    for name in ("scale", "features", "image_features", "text_features", "again"):
        expected = np.asarray(theirs[name])
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    # 100 times a rounding of the cosines is what a probability may be off by, of itself.
    for name in ("probs", "similarity", "values"):
        np.testing.assert_allclose(ours[name], np.asarray(theirs[name]), rtol=1e-4, err_msg=name)


def test_the_check_prints_what_the_page_shows(small_file, tmp_path):
    openai_clip()
    page = PAGE.read_text(encoding="utf-8")
    (line,) = re.findall(r"^python (.* --check)$", page, re.MULTILINE)
    done = run(*shlex.split(line.replace(NAME, str(small_file)).replace("vit-b-32.pt", str(tmp_path / "out.pt"))))
    assert done.returncode == 0, done.stderr
    for words in ("max absolute error", "max relative error", "≤ 1e-05", "image features", "text features", "logits"):
        assert words in page
        assert words in done.stdout
