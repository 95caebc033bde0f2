"""Files of tensors: ours are the library's to the byte, kinds are told by content, and a missing shard is named."""

import itertools
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from clip_jax.errors import UserError
from clip_jax.weights import archive
from clip_jax.weights.streaming import Lazy
from clip_jax.weights.tensors import DTYPES, read_file, read_first, read_safetensors, write_safetensors


def some_tensors() -> dict[str, np.ndarray]:
    """Returns tensors of all types and of several shapes, by names that need care."""
    rng = np.random.default_rng(0)
    names, shapes = ("b", "a.10", "a.9", 'é"\\\n\x01\u2028'), itertools.cycle([(3, 4), (), (5,), (0, 4), (2, 3, 2)])
    return {
        f"{name}.{i}": np.asarray(rng.integers(0, 2, next(shapes))).astype(dtype)
        for name in names
        for i, dtype in enumerate(DTYPES.values())
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        assert found[name].tobytes() == x.tobytes()


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_what_we_write_is_byte_for_byte_what_the_library_writes(tmp_path):
    tensors = some_tensors()
    write_safetensors(tmp_path / "ours", tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert_same(read_safetensors(tmp_path / "ours"), tensors)
    assert all(x.ctypes.data % x.itemsize == 0 for x in read_safetensors(tmp_path / "ours").values())
    with safetensors.safe_open(tmp_path / "ours", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_order_in_which_tensors_come_and_how_they_lie_change_no_byte(tmp_path):
    tensors = some_tensors() | {"large": np.random.default_rng(0).normal(size=(300, 7, 5000))}
    write_safetensors(tmp_path / "a", tensors)
    for x in (np.asfortranarray(tensors["large"]), np.repeat(tensors["large"], 2, axis=1)[:, ::2]):
        write_safetensors(tmp_path / "b", dict(reversed((tensors | {"large": x}).items())))
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("write", [write_safetensors, archive.write])
def test_a_writer_has_let_go_of_one_tensor_before_the_next_is_made(write, tmp_path):
    alive: list[weakref.ref] = []

    def make(names):
        for name in names:
            assert not any(one() is not None for one in alive)
            alive.append(weakref.ref(x := np.full((4, 5), float(name), np.float32)))
            yield x
            del x

    names = [str(i) for i in range(5)]
    spec = np.broadcast_to(np.float32(0), (4, 5))
    write(tmp_path / "file", Lazy(dict.fromkeys(names, spec), [([name], make) for name in names]))
    assert len(alive) >= 5
    assert {name: x[0, 0] for name, x in read_file(tmp_path / "file").items()} == {str(i): i for i in range(5)}


def test_a_type_that_safetensors_do_not_have_here_is_refused_by_its_name(tmp_path):
    with pytest.raises(UserError, match=r"a\.b \(complex64\), c \(>f4\)"):
        write_safetensors(tmp_path / "file", {"a.b": np.zeros(2, np.complex64), "c": np.zeros(2, ">f4")})
    assert not list(tmp_path.iterdir())


def test_what_is_no_safetensors_file_is_said(tmp_path):
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)})
    good = file.read_bytes()
    header = int.from_bytes(good[:8], "little")
    for bad in (
        b"",
        b"hello " * 100,
        good[: len(good) // 2],
        good[:-1],
        good[:4],
        good + b"\0",
        (1 << 60).to_bytes(8, "little") + good[8:],
        good[:8] + b"[" * header + good[8 + header :],
        good.replace(b'"F32"', b'"F99"', 1),
        good.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
    ):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"model\.safetensors: (not a safetensors file|cannot be read)"):
            read_safetensors(file)
        with pytest.raises(UserError, match=r"model\.safetensors: (not a safetensors|neither a safetensors) file"):
            read_file(file)
    file.unlink()
    for path in (file, tmp_path):
        for read in (read_safetensors, read_file):
            with pytest.raises(UserError, match=r"No such file|cannot be read"):
                read(path)


def test_a_type_that_no_model_has_is_refused_by_its_name(tmp_path):
    safetensors.numpy.save_file({"a.b": np.zeros(2, np.uint64)}, tmp_path / "file")
    with pytest.raises(UserError, match=r"a\.b \(U64\)"):
        read_safetensors(tmp_path / "file")


def test_safetensors_are_read_as_views_that_cannot_be_written_to(tmp_path):
    safetensors.numpy.save_file({"a": np.arange(3.0), "empty": np.zeros((0, 4))}, tmp_path / "file", {"format": "np"})
    tensors = read_safetensors(tmp_path / "file")
    assert tensors.keys() == {"a", "empty"}
    assert tensors["empty"].shape == (0, 4)
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"][0] = 1


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model"])
@pytest.mark.parametrize("write", [write_safetensors, archive.write])
def test_a_files_kind_is_told_by_its_content_not_its_name(name, write, tmp_path):
    write(tmp_path / name, some_tensors())
    assert_same(read_file(tmp_path / name), some_tensors())


def test_a_header_as_long_as_the_beginning_of_a_pickle_is_no_pickle(tmp_path):
    tensors = {"a": np.zeros(2, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "file", {"format": "pt", "padding": "x" * 535})
    assert (tmp_path / "file").read_bytes()[:2] == b"\x80\x02"
    assert_same(read_file(tmp_path / "file"), tensors)


def test_a_bare_pickle_is_told_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match=r"before version 1\.6.*torch\.save"):
        read_file(tmp_path / "pytorch_model.bin")


NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def test_the_first_file_that_is_there_is_read(tmp_path):
    with pytest.raises(UserError, match=r"has no weights: none of model\.safetensors, .*bin\.index\.json"):
        read_first(tmp_path, NAMES)
    for i, name in reversed([*enumerate(NAMES)]):
        if name.endswith(".index.json"):
            write_safetensors(tmp_path / f"shard {i}", {"a": np.full(2, i)})
            write_index(tmp_path, {"a": f"shard {i}"}, name)
        else:
            write_safetensors(tmp_path / name, {"a": np.full(2, i)})
        tensors, path = read_first(tmp_path, NAMES)
        assert path == tmp_path / name
        assert_same(tensors, {"a": np.full(2, i)})


@pytest.mark.parametrize("write", [write_safetensors, archive.write])
def test_all_shards_of_an_index_are_read(write, tmp_path):
    tensors = some_tensors()
    files = {name: f"model-{i % 3}.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        write(tmp_path / file, {name: x for name, x in tensors.items() if files[name] == file})
    write_index(tmp_path, files)
    assert_same(read_first(tmp_path, NAMES)[0], tensors)


def test_of_a_tensor_in_two_shards_the_one_counts_that_the_index_says_and_what_it_leaves_out_is_there(tmp_path):
    write_safetensors(tmp_path / "1", {"a": np.zeros(2), "position_ids": np.arange(3)})
    write_safetensors(tmp_path / "2", {"a": np.ones(2), "b": np.ones(3)})
    for file in "12":
        write_index(tmp_path, {"a": file, "b": "2", "position_ids": "1"} if file == "2" else {"a": file, "b": "2"})
        found, _ = read_first(tmp_path, NAMES)
        assert_same(found, {"a": np.full(2, float(file == "2")), "b": np.ones(3), "position_ids": np.arange(3)})


def test_one_error_lists_all_that_an_index_and_its_files_disagree_in(tmp_path):
    write_safetensors(tmp_path / "1.safetensors", {"a": np.zeros(2)})
    (tmp_path / "broken.safetensors").write_text("hello")
    files = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "3.safetensors"}
    files |= {"e": "../4.safetensors", "f": "/5.safetensors", "g": "x\\..\\6", "h": "", "i": "a\0b"}
    write_index(tmp_path, files | {"j": "broken.safetensors"})
    with pytest.raises(UserError) as error:
        read_first(tmp_path, NAMES)
    for words in (
        f"{tmp_path / NAMES[1]}: ",
        "not in the file it says (1): b (1.safetensors)",
        f"{tmp_path / '2.safetensors'}: cannot be read: No such file",
        f"{tmp_path / '3.safetensors'}: cannot be read: No such file",
        *(f"{name}, which leads out of the folder" for name in ("'../4.safetensors'", "'/5.safetensors'", "''")),
        "6', which leads out of the folder",
        "b', which leads out of the folder",
        f"{tmp_path / 'broken.safetensors'}: neither a safetensors file nor",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_what_is_no_index_is_said(content, tmp_path):
    (tmp_path / NAMES[1]).write_text(content)
    with pytest.raises(UserError, match=r"index\.json(: weight_map=.* should say the file| cannot be read: )"):
        read_first(tmp_path, NAMES)
