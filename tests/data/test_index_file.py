"""A file that stands for another: found again, stale when the other changes, never trusted when it is damaged."""

import os
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from clip_jax.data import index_file, storage
from clip_jax.data.storage import File
from clip_jax.errors import UserError

TAG = index_file.tag_of("a choice")
NOTED = {"records": 3, "words": "ä"}
TABLE = pa.table({"number": pa.array([1, 2, 3], pa.uint32()), "name": pa.array([b"a", b"\xff", b"ccc"])})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder for what cannot lie beside."""
    monkeypatch.setenv(index_file.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def other(tmp_path) -> File:
    """What the file stands for."""
    return file_of(tmp_path / "folder", "other.tar")


@pytest.fixture
def remote(tmp_path) -> File:
    """What it stands for, behind a URL."""
    url = f"memory://{tmp_path.name}/other.tar"
    system = fsspec.filesystem("memory")
    system.pipe_file(url, b"content")
    yield File(url, 7, "stamp")
    system.rm(f"memory://{tmp_path.name}", recursive=True)


def file_of(folder: Path, name: str) -> File:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"content")
    return storage.look_up([str(folder / name)])[0]


def write(of: File, *, tag: str = TAG, noted: object = NOTED, tables: int = 2) -> Path:
    return index_file.write(of, tag, TABLE.schema, lambda: (TABLE for _ in range(tables)), noted)


def block(path: Path) -> None:
    """Makes that nobody can write a file, root neither: a folder with something in it has its name."""
    (path / "something").mkdir(parents=True)


# --- where it lies ---


def test_what_was_written_is_found_with_what_was_noted(other):
    assert index_file.find(other, TAG) is None
    path = write(other)
    assert index_file.find(other, TAG) == (path, NOTED)
    assert index_file.mapped(path).to_pydict() == pa.concat_tables([TABLE, TABLE]).to_pydict()


@pytest.mark.parametrize("noted", [{}, [], 0, ""])
def test_what_is_noted_may_be_empty(noted, other):
    assert index_file.find(other, TAG) is None
    assert index_file.find(other, TAG) != (write(other, noted=noted), None)
    assert index_file.find(other, TAG)[1] == noted


def test_a_file_without_rows_is_one(other):
    path = write(other, tables=0)
    assert len(index_file.mapped(path)) == 0
    assert index_file.mapped(path).column_names == TABLE.column_names


def test_it_lies_beside_the_other_with_its_name_and_nothing_else_is_left(other, cache):
    path = write(other)
    assert path == Path(f"{other.path}.{TAG}.index")
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["other.tar", path.name]
    assert not cache.exists()


def test_several_choices_lie_side_by_side(other):
    paths = {choice: write(other, tag=index_file.tag_of(choice), noted=choice) for choice in ("a", "b")}
    assert paths["a"] != paths["b"]
    assert all(index_file.find(other, index_file.tag_of(choice))[1] == choice for choice in paths)


def test_a_tag_is_eight_digits_and_other_for_other_facts():
    tags = [index_file.tag_of(*facts) for facts in [("a",), ("b",), ("a", "b"), (["a", "b"],), (1,), ("1",), ()]]
    assert all(len(tag) == 8 and int(tag, 16) >= 0 for tag in tags)
    assert len(set(tags)) == len(tags)
    assert index_file.tag_of("a", {"b": (1, 2)}) == index_file.tag_of("a", {"b": [1, 2]})


def test_a_relative_path_finds_what_an_absolute_one_wrote(other, monkeypatch):
    path = write(other)
    monkeypatch.chdir(path.parent)
    assert index_file.find(other._replace(path="other.tar"), TAG) == (path, NOTED)


@pytest.mark.parametrize("changed", [{"size": 8}, {"stamp": "later"}])
def test_when_the_other_changes_it_is_stale(changed, other):
    path = write(other)
    now = other._replace(**changed)
    assert index_file.find(now, TAG) is None
    assert write(now, noted="new") == path
    assert index_file.find(now, TAG) == (path, "new")
    assert index_file.find(other, TAG) is None


def test_where_it_cannot_lie_beside_it_lies_in_the_cache_folder(other, cache):
    block(index_file.places(other, TAG)[0])
    path = write(other)
    assert path.parent == cache
    assert index_file.find(other, TAG) == (path, NOTED)
    assert len(index_file.mapped(path)) == 2 * len(TABLE)  # though all of it had been written once, in vain


def test_where_no_file_can_be_made_it_lies_in_the_cache_folder(cache):
    if not Path("/proc/version").exists():
        pytest.skip("no Linux system folder")
    of = File("/proc/version", 7, "")
    assert write(of).parent == cache
    assert index_file.find(of, TAG)[1] == NOTED


def test_a_good_one_in_the_cache_folder_counts_when_that_beside_is_stale(other):
    now = other._replace(stamp="later")
    beside = write(other)
    good = beside.read_bytes()
    beside.unlink()
    block(beside)
    path = write(now)
    (beside / "something").rmdir()
    beside.rmdir()
    beside.write_bytes(good)
    assert index_file.find(other, TAG) == (beside, NOTED)
    assert index_file.find(now, TAG) == (path, NOTED)


def test_in_the_cache_folder_files_of_one_name_do_not_meet(tmp_path, cache):
    others = [file_of(tmp_path / folder, "other.tar") for folder in ("a", "b")]
    for other in others:
        block(index_file.places(other, TAG)[0])
    paths = [write(other, noted=other.path) for other in others]
    assert {path.parent for path in paths} == {cache}
    assert [index_file.find(other, TAG)[1] for other in others] == [other.path for other in others]


def test_a_name_that_leaves_no_room_for_another_beside_it_is_as_good(tmp_path, cache):
    other = file_of(tmp_path / "folder", "n" * 251 + ".tar")
    assert index_file.find(other, TAG) is None
    path = write(other)
    assert path.parent == cache
    assert index_file.find(other, TAG) == (path, NOTED)


def test_where_there_is_no_place_at_all_a_variable_is_named(other, cache):
    block(index_file.places(other, TAG)[0])
    cache.write_bytes(b"a file")
    with pytest.raises(UserError, match=rf"^cannot write {cache}/\S+: \w.*; or name a folder in CLIP_JAX_INDEX_CACHE$"):
        write(other)


def test_without_a_home_folder_the_variable_is_named(other, monkeypatch):
    monkeypatch.delenv(index_file.CACHE)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does when there is no home
    with pytest.raises(UserError, match=r"no home folder.*CLIP_JAX_INDEX_CACHE$"):
        index_file.find(other, TAG)


def test_the_usual_cache_folder_is_in_the_home_folder(other, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(index_file.CACHE, "")
    assert index_file.places(other, TAG)[1].parent == tmp_path / ".cache/clip_jax/index"


# --- when it is damaged ---


@pytest.fixture
def path(other) -> Path:
    return write(other)


def after(path: Path, content: bytes, other: File) -> str:
    """Returns what is found when the file has another content: nothing, or what of it can be relied on."""
    path.unlink()  # not written over: it may be mapped
    path.write_bytes(content)
    found = index_file.find(other, TAG)
    if found is None:
        return "none"
    assert found == (path, NOTED)
    try:
        table = index_file.mapped(path)
    except UserError as error:
        return str(error).replace(f"{path} is damaged; delete it, so that it is made anew", "damaged")
    assert table.schema.equals(TABLE.schema)
    assert all(len(row["name"]) < 100 for row in table.to_pylist())  # each can be looked at
    return "same" if table.to_pydict() == pa.concat_tables([TABLE, TABLE]).to_pydict() else "other"


def test_a_file_that_is_cut_anywhere_is_none(path, other):
    content = path.read_bytes()
    assert {after(path, content[:size], other) for size in range(len(content))} == {"none"}
    assert after(path, content, other) == "same"


@pytest.mark.parametrize(
    "content",
    [b"", bytes(100), bytes(5000), b"ARROW1", b"\xff" * 3000, b"<html></html>", random.Random(0).randbytes(3000)],
)
def test_what_is_no_such_file_is_none(content, path, other):
    assert after(path, content, other) == "none"


def test_noise_in_its_midst_is_noticed_or_has_other_values(path, other):
    chosen, content = random.Random(0), path.read_bytes()
    for _ in range(300):
        start = chosen.randrange(8, len(content) - 10)
        noise = chosen.randbytes(min(chosen.choice([3, 30, 300]), len(content) - 10 - start))
        found = after(path, content[:start] + noise + content[start + len(noise) :], other)
        assert found in {"none", "damaged", "other", "same"}  # of what is there twice, only one is read


def test_zeros_in_its_midst_are_noticed_or_other_values(path, other):
    """As a machine leaves them that went out of power."""
    content = path.read_bytes()
    for start in range(0, len(content), 64):
        zeros = bytes(min(512, len(content) - start))
        found = after(path, content[:start] + zeros + content[start + len(zeros) :], other)
        assert found in {"none", "damaged", "other", "same"}


@pytest.mark.parametrize("bits", [0xFF, 0x01, 0x80])
def test_a_byte_that_is_another_is_noticed_or_one_of_the_tables_values(bits, path, other):
    content, seen = path.read_bytes(), []
    for at in range(len(content)):
        seen.append(after(path, content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :], other))
    assert set(seen) == {"none", "damaged", "other", "same"}
    known = content.rindex(b'{"of"')  # the last is what is read
    assert set(seen[known : content.index(b"}}", known) + 2]) == {"none"}
    assert seen.count("other") <= TABLE.nbytes * 2


# --- for what lies behind a URL ---


def test_for_a_url_it_lies_in_the_cache_folder_and_a_copy_beside(remote, cache, tmp_path, monkeypatch):
    path = write(remote)
    assert path.parent == cache
    beside = f"{remote.path}.{TAG}.index"
    assert fsspec.filesystem("memory").cat_file(beside) == path.read_bytes()
    monkeypatch.setenv(index_file.CACHE, str(tmp_path / "another host"))
    fetched, noted = index_file.find(remote, TAG)
    assert (fetched.parent, noted) == (tmp_path / "another host", NOTED)
    assert fetched.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("content", [b"", b"noise", bytes(2000)])
def test_what_is_damaged_beside_a_url_is_written_anew(content, remote):
    beside = f"{remote.path}.{TAG}.index"
    fsspec.filesystem("memory").pipe_file(beside, content)
    assert index_file.find(remote, TAG) is None
    path = write(remote)
    assert index_file.find(remote, TAG) == (path, NOTED)
    assert fsspec.filesystem("memory").cat_file(beside) == path.read_bytes()


def test_what_beside_a_url_stands_for_an_older_state_is_written_anew(remote):
    path = write(remote)
    now = remote._replace(stamp="later")
    assert index_file.find(now, TAG) is None
    assert write(now, noted="new") == path
    assert index_file.find(now, TAG) == (path, "new")


def test_a_server_that_takes_nothing_is_no_reason_to_stop(remote, monkeypatch):
    def refuse(*_) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(fsspec.filesystem("memory"), "pipe_file", refuse)
    path = write(remote)
    assert index_file.find(remote, TAG) == (path, NOTED)


@pytest.mark.parametrize("error", [PermissionError("403, Forbidden"), OSError("500, no"), ValueError("odd")])
def test_a_server_that_does_not_say_whether_there_is_one_is_no_reason_to_stop(error, remote, monkeypatch):
    """Some say of what is not there that it may not be read."""

    def refuse(*_, **__) -> None:
        raise error

    monkeypatch.setattr(storage, "RETRIES", (0.0,))
    monkeypatch.setattr(fsspec.filesystem("memory"), "cat_file", refuse)
    assert index_file.find(remote, TAG) is None


def test_without_a_cache_folder_what_is_there_cannot_be_used_and_the_variable_is_named(remote, tmp_path, monkeypatch):
    write(remote)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(index_file.CACHE, str(tmp_path / "file"))
    for call in (lambda: index_file.find(remote, TAG), lambda: write(remote)):
        with pytest.raises(UserError, match=r"^cannot write .*; or name a folder in CLIP_JAX_INDEX_CACHE$"):
            call()
