"""A model's folder is as it was, or complete, or nobody's; and what is not ours in it is never touched."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.weights import folder
from clip_jax.weights.tensors import read_file

NAMES = ("config.json", "tokenizer.json", "vocab.json", "model.safetensors")


def write(path: Path, seed: int, **keywords) -> None:
    """Writes a model whose files all say the seed; an odd one has no tokenizer."""
    texts = {"config.json": f"{seed}", "tokenizer.json": None if seed % 2 else f"{seed}\r\n", "vocab.json": f"é{seed}"}
    folder.write(path, texts, "model.safetensors", {"seed": np.array([seed])}, **keywords)


def seen(path: Path) -> dict[str, str]:
    """Returns what is in a folder's files, temporaries apart."""
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    return {
        file.name: str(read_file(file)["seed"][0])
        if file.suffix == ".safetensors"
        else file.read_bytes().decode("utf-8")
        for file in files
    }


def model(seed: int) -> dict[str, str]:
    tokenizer = {} if seed % 2 else {"tokenizer.json": f"{seed}\r\n"}
    return {"config.json": f"{seed}", **tokenizer, "vocab.json": f"é{seed}", "model.safetensors": f"{seed}"}


def test_texts_and_tensors_are_written_as_they_are(tmp_path):
    write(tmp_path / "a" / "b", 2)
    assert seen(tmp_path / "a" / "b") == model(2)


@pytest.mark.parametrize(("old", "new"), [(2, 4), (2, 3), (3, 2), (3, 5)])
def test_a_model_is_replaced_and_no_file_of_it_stays(old, new, tmp_path):
    write(tmp_path, old)
    write(tmp_path, new)
    assert seen(tmp_path) == model(new)
    assert len(list(tmp_path.iterdir())) == len(model(new))


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    (tmp_path / ".config.123.0a1b2c3d.json").write_text("{")
    (tmp_path / ".model.123.0a1b2c3d.safetensors").write_text("half")
    (tmp_path / "model.safetensors").write_text("of a model without a config")
    write(tmp_path, 2)
    assert seen(tmp_path) == model(2)


def test_a_folder_that_holds_anything_else_is_refused_by_its_name_and_left_alone(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".git").mkdir()
    with pytest.raises(UserError, match=r"something other than such a model: \.git, notes\.txt; choose another"):
        write(tmp_path, 4)
    (tmp_path / ".git").rmdir()
    assert seen(tmp_path) == model(2) | {"notes.txt": "mine"}
    write(tmp_path, 4, replaces=True)
    assert seen(tmp_path) == model(4) | {"notes.txt": "mine"}
    with pytest.raises(UserError, match="Not a directory"):
        write(tmp_path / "notes.txt", 4)


class Power:
    """Goes off after so many calls that change something in a folder."""

    def __init__(self, left: int):
        self.left = left

    def on(self, call: Callable) -> Callable:
        def counted(*arguments, **keywords):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return call(*arguments, **keywords)

        return counted


@pytest.mark.parametrize(("old", "new"), [(2, 4), (2, 3), (3, 2)])
def test_an_end_at_any_step_leaves_the_old_model_or_none_or_the_new_one(old, new, tmp_path, monkeypatch):
    outcomes = []
    for step in range(30):
        path, power = tmp_path / str(step), Power(step)
        write(path, old)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for method in ("unlink", "replace", "write_text"):
                patch.setattr(Path, method, power.on(getattr(Path, method)))
            write(path, new)
        found = seen(path)
        outcomes.append([model(old), model(new)].index(found) if "config.json" in found else None)
        write(path, 6)
        assert seen(path) == model(6)
        if power.left >= 0:
            break
    assert outcomes == sorted(outcomes, key=[0, None, 1].index)
    assert set(outcomes) == {0, None, 1}


def test_tensors_that_cannot_be_written_leave_the_old_model(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(UserError, match="complex128"):
        folder.write(tmp_path, dict.fromkeys(NAMES[:3], "new"), NAMES[3], {"x": np.zeros(3, complex)})
    assert seen(tmp_path) == model(2)
    assert len(list(tmp_path.iterdir())) == len(model(2))
