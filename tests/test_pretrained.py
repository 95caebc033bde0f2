"""What is no model is refused by what it is, in one line, and never looked for in the current folder."""

import inspect
from pathlib import Path

import numpy as np
import pytest

from clip_jax import pretrained
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.weights.bundle import Bundle, write_folder
from clip_jax.weights.mapping import flatten

SMALL = "ViT-W64/4@16px"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "the name of a model is empty"),
        (None, "not None of type NoneType"),
        (3, "not 3 of type int"),
        (["ViT-B/32"], r"not \['ViT-B/32'\] of type list"),
        (b"ViT-B/32", "not b'ViT-B/32' of type bytes"),
        ("x" * 300, "is no file, no folder"),
        ("x/" * 5000, "is no file, no folder"),
        ("~nobody-of-this-name/x", "is no file, no folder"),
        ("a\0b", "is no file, no folder"),
    ],
)
def test_what_is_no_name_and_no_path_is_refused(source, words):
    with pytest.raises(UserError, match=words):
        inspect.unwrap(pretrained.read)(source)  # the tests' own look at types would come first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": "clip_jax", ', r"config\.json cannot be read: Expecting"),
        ("[" * 100_000, r"config\.json cannot be read: .*recursion"),
        ('{"format": "x", "architecture": {}}', r"config\.json: format='x' should be 'clip_jax'"),
        ('{"architecture": {}}', r"config\.json should have 'format', .* or 'config'"),
        ("[]", r"config\.json should have 'format', .* or 'config'"),
        (None, r"not a run's folder, nor a model's: it has no config\.json"),
    ],
)
def test_a_folder_that_holds_no_model_is_refused_by_what_its_config_lacks(text, words, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        pretrained.read(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tilde_is_the_home_folder_in_a_source_and_in_a_target(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shapes = flatten(Definition(VARIANTS[SMALL]).shapes())
    arrays = {path: np.zeros(x.shape, x.dtype) for path, x in shapes.items()}
    write_folder(tmp_path / "one", Bundle(VARIANTS[SMALL], arrays, SMALL, "zeros"))
    assert pretrained.convert("~/one", "clip_jax", Path("~/other"))
    assert pretrained.read("~/other").variant == SMALL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]
