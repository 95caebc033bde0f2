"""A conversion needs the memory of its largest array, however large its file is."""

import filecmp
import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clip_jax.weights.streaming import Lazy, give_back, raw, specs_of

ROOT = Path(__file__).parents[2]


def lazy(**arrays: np.ndarray) -> Lazy:
    """Returns the arrays as a lazy mapping in which all are cut out of one whole."""
    return Lazy(arrays, [(list(arrays), lambda names: (arrays[name].copy() for name in names))])


def test_a_lazy_mapping_is_a_mapping():
    arrays = {"a": np.arange(3), "b": np.arange(4.0)}
    found = lazy(**arrays)
    assert (len(found), list(found), "a" in found, "c" in found, found.get("c")) == (2, ["a", "b"], True, False, None)
    assert found.keys() == arrays.keys()
    assert specs_of(found) is not found
    assert specs_of(arrays) is arrays
    assert all(np.array_equal(x, arrays[name]) for name, x in found.items())
    assert found["a"] is not found["a"]


def test_of_two_mappings_that_are_joined_the_second_counts_and_both_stay_lazy():
    one, two = lazy(a=np.zeros(1), b=np.zeros(2)), {"b": np.ones(3), "c": np.ones(4)}
    for joined, b in ((one | two, 1), (two | one, 0), (one | lazy(**two), 1), (lazy(**two) | one, 0)):
        assert {name: x.mean() for name, x in joined.items()} == {"a": 0, "b": b, "c": 1}
        assert {name: x.shape for name, x in joined.items()} == {name: x.shape for name, x in joined.specs.items()}
        assert joined["b"].mean() == b
        assert joined["a"] is not joined["a"]


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 3), (400, 7, 3, 999)])
@pytest.mark.parametrize("turn", [lambda x: x, lambda x: x.T, lambda x: x[..., ::2] if x.ndim else x])
def test_the_bytes_of_an_array_come_in_c_order_in_pieces(shape, turn):
    x = turn(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    pieces = list(raw(x))
    assert b"".join(piece.tobytes() for piece in pieces) == x.tobytes()
    assert max(piece.nbytes for piece in pieces) <= (x.nbytes if x.flags.c_contiguous else 17 << 20)


def resident(what: str = "RssFile") -> int:
    """Returns the bytes of this process's memory of a kind."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[what].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_the_pages_of_a_mapped_file_are_given_back_and_can_be_read_again(tmp_path):
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(range(256)) * (size // 256))
    with (tmp_path / "file").open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    before = resident()
    x = np.lib.stride_tricks.as_strided(np.frombuffer(memoryview(content)[10:], np.uint8), (size // 2 - 10,), (2,))
    total = x.sum()
    assert resident() - before > 0.9 * size
    give_back(x)
    assert resident() - before < 0.1 * size
    assert x.sum() == total


def test_what_could_be_written_to_is_never_given_back():
    for content in (mmap.mmap(-1, 8192), np.ones(8192, np.uint8)):
        x = np.frombuffer(content, np.uint8) if isinstance(content, mmap.mmap) else content
        x[:] = 7
        give_back(x)
        give_back(x[10:].data)
        assert (x == 7).all()


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder for large files, which is gone at once; pytest would keep three of them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def measured(code: str, folder: Path, timeout: int) -> dict[str, float]:
    """Returns the JSON that a fresh process prints, which has `benchmarks/conversion_memory.py` at hand as `c`."""
    head = "import json, sys; from pathlib import Path; import conversion_memory as c; folder = Path(sys.argv[1])"
    command = [sys.executable, "-c", f"{head}\n{code}", str(folder)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ALL_CONVERSIONS = """
variant, source = "ViT-B/32", folder / "first"
c.make("ViT-W64/4@16px", "float16", folder / "small")  # what libraries and tokenizers take is no file's
c.pretrained.convert(folder / "small", "huggingface", folder / "warm")
before = c.peak_memory()
c.make(variant, "float16", source)
for i, format_ in enumerate(c.route(variant)):
    c.pretrained.convert(source, format_, folder / f"{i}.pt")
    source = folder / f"{i}.pt"
print(json.dumps({"grown": c.peak_memory() - before, "size": c.size_of(source), "last": source.name, "formats": i + 1}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_conversions_of_a_300_mb_file_take_two_thirds_of_its_memory_and_change_no_byte(disk):
    found = measured(ALL_CONVERSIONS, disk, 100)
    assert filecmp.cmp(disk / "first" / "model.safetensors", disk / found["last"] / "model.safetensors", shallow=False)
    assert found["size"] > 300e6
    assert found["formats"] == 4, "OpenAI's, OpenCLIP's, Hugging Face's, ours"
    assert found["grown"] < found["size"] * 2 / 3


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
def test_converting_2_5_billion_parameters_takes_1_3_times_the_memory_of_the_file_at_most(disk):
    """All that the process ever has counts: imports, JAX, the pages of the file that it reads."""
    variant, source = "ViT-bigG-14", "first"
    measured(f"c.make({variant!r}, 'float16', folder / 'first'); print('{{}}')", disk, 300)
    for format_ in ("open_clip", "huggingface", "clip_jax"):
        arguments = f"{format_!r}, folder / {source!r}, folder / {format_!r}"
        peak, *_ = measured(f"print(json.dumps(c.measured({arguments})))", disk, 300)
        assert peak <= 1.3 * 2 * 2_539_567_105
        source = format_
    assert filecmp.cmp(disk / "first" / "model.safetensors", disk / source / "model.safetensors", shallow=False)
