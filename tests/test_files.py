"""Files are whole or not there, whoever else writes the same one at the time."""

from pathlib import Path

import pytest

from clip_jax.errors import UserError
from clip_jax.files import is_temporary, whole, write_text


def test_two_writers_of_one_file_do_not_meet_and_the_last_one_stays(tmp_path):
    target = tmp_path / "a.json"
    with whole(target) as one:
        with whole(target) as other:
            assert one != other
            one.write_text("one")
            other.write_text("other")
        assert target.read_text() == "other"
    assert target.read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]


def test_a_temporary_is_known_by_its_name_and_nothing_else_is(tmp_path):
    with whole(tmp_path / "model.safetensors") as temporary:
        assert is_temporary(temporary.name, "model.safetensors")
        assert not is_temporary(temporary.name, "config.json")
        temporary.touch()
    assert is_temporary(".model.12.safetensors", "model.safetensors"), "as older versions call it"
    for name in ("model.safetensors", ".model.safetensors", ".model.mine.safetensors", ".hidden"):
        assert not is_temporary(name, "model.safetensors")


@pytest.mark.parametrize("target", ["", ".", "/"])
def test_a_target_without_a_name_is_refused(target):
    with pytest.raises(UserError, match="it names no file; give the file a name"):
        write_text(Path(target), "text")
