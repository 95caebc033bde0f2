"""PyTorch's files without PyTorch: the same tensors, nothing run, and damage is always noticed."""

import collections
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracles import require

from clip_jax.errors import UserError
from clip_jax.weights import archive

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.int32, np.int16, np.int8, np.uint8, bool]


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (), (5,), (2, 3, 2, 2), (0, 4), (1,)]
    return {
        f"block.{i}.weight": np.asarray(rng.integers(0, 2, shapes[i % len(shapes)])).astype(dtype)
        for i, dtype in enumerate(DTYPES)
    } | {"weight": rng.normal(size=(16, 8)).astype(np.float32)}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        assert found[name].tobytes() == x.tobytes()


def as_numpy(tensor) -> np.ndarray:
    torch = require("torch")
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


@pytest.fixture
def good(tmp_path) -> Path:
    path = tmp_path / "good.pt"
    archive.write(path, some_tensors())
    return path


def test_what_is_written_is_read_bit_for_bit_and_written_the_same(good, tmp_path):
    assert_same(archive.read(good), some_tensors())
    archive.write(tmp_path / "again.pt", archive.read(good))
    assert (tmp_path / "again.pt").read_bytes() == good.read_bytes()


def test_what_is_read_cannot_be_written_to(good):
    with pytest.raises(ValueError, match="read-only"):
        archive.read(good)["weight"][0, 0] = 1


def test_pytorch_reads_what_we_write(good):
    torch = require("torch")
    loaded = torch.load(good, weights_only=True)
    assert isinstance(loaded, collections.OrderedDict)
    assert_same({name: as_numpy(x) for name, x in loaded.items()}, some_tensors())


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"epoch": 3, "state_dict": d}], ids=["flat", "state_dict"])
def test_we_read_what_pytorch_writes_with_shared_and_strided_storages(wrap, tmp_path):
    torch = require("torch")
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    tensors = {
        "module.base": base,
        "module.part": base[1:3, 4:],
        "module.transposed": base.T,
        "module.half": base.half(),
        "module.bfloat16": base.to(torch.bfloat16),
        "module.long": torch.tensor(224),
        "module.parameter": torch.nn.Parameter(base[0]),
        "module.empty": torch.zeros(0, 3),
    }
    torch.save(wrap(tensors), tmp_path / "file.pt")
    expected = {name.removeprefix("module."): as_numpy(x) for name, x in tensors.items()}
    assert_same(archive.read(tmp_path / "file.pt"), expected)


def test_we_read_torchscript_archives(tmp_path):
    torch = require("torch")

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3).half())
            self.register_buffer("count", torch.tensor(7))

        def forward(self, x):
            return x @ self.weight.float().T + self.count

    model = torch.nn.Sequential(Inner(), torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its own format deprecated
        torch.jit.trace(model, torch.randn(5, 3)).save(tmp_path / "script.pt")
    expected = {name: as_numpy(x) for name, x in model.state_dict().items()}
    found = archive.read(tmp_path / "script.pt")
    assert_same({name: found[name] for name in expected}, expected)
    assert found.keys() == expected.keys()


def pickled(path: Path, data: bytes) -> Path:
    """Writes an archive that holds this pickle and nothing else."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
    return path


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Runs(__import__("os").system, "touch {marker}"), "system"),
        (Runs(eval, "open('{marker}', 'w')"), r"\.eval"),
        (Runs(__import__("subprocess").check_call, ["touch", "{marker}"]), "check_call"),
        (Runs(getattr, Path, "touch"), "getattr"),
        (Runs(np.fromfile, "/etc/passwd"), "fromfile"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pickle_that_names_anything_else_is_refused_by_name_and_nothing_runs(call, name, protocol, tmp_path):
    function, arguments = call.call
    marker = tmp_path / "marker"
    filled = [a.format(marker=marker) if isinstance(a, str) else a for a in arguments]
    path = pickled(tmp_path / "bad.pt", pickle.dumps({"weight": Runs(function, *filled)}, protocol=protocol))
    with pytest.raises(UserError, match=name) as error:
        archive.read(path)
    assert str(path) in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "numbers an object"),
        (b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.", "os.system"),
        (b"\x80\x02(ios\nsystem\n.", "INST"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x80\x02]" + b"]" * 100 + b"a" * 99 + b".", ""),
    ],
)
def test_a_pickle_that_is_no_description_of_tensors_is_refused(data, words, tmp_path):
    path = pickled(tmp_path / "bad.pt", data)
    try:
        assert archive.read(path) == {}
    except UserError as error:
        assert words in str(error)  # noqa: PT017 (both ends are allowed)


def test_a_pickle_whose_objects_multiply_when_walked_is_refused(tmp_path):
    tree: dict = {}
    for _ in range(64):
        tree = {"a": tree, "b": tree}
    with pytest.raises(UserError, match="objects"):
        archive.read(pickled(tmp_path / "bomb.pt", pickle.dumps(tree, protocol=2)))


def test_what_is_no_such_file_is_said(good, tmp_path):
    cases = {
        "empty": b"",
        "text": b"hello " * 100,
        "old": pickle.dumps({"weight": 1}, protocol=2),
        "half": good.read_bytes()[: good.stat().st_size // 2],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            archive.read(tmp_path / name)
    with pytest.raises(UserError, match=r"before version 1\.6.*torch\.save"):
        archive.read(tmp_path / "old")
    with pytest.raises(UserError, match="No such file"):
        archive.read(tmp_path / "nowhere")


def test_members_that_lead_out_or_are_compressed_or_double_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "out.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        file.writestr("archive/../../evil", b"x")
    with pytest.raises(UserError, match="leads out"):
        archive.read(tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps(dict.fromkeys(map(str, range(99))), protocol=2))
    with pytest.raises(UserError, match="compressed"):
        archive.read(tmp_path / "small.pt")


def test_1000_mutated_archives_give_the_same_tensors_or_our_error(good, tmp_path):
    whole, expected, rng = good.read_bytes(), some_tensors(), random.Random(0)
    with zipfile.ZipFile(good) as file:
        places = [info.header_offset for info in file.infolist()]
    refused = 0
    for i in range(1000):
        data = bytearray(whole)
        kind = i % 4
        if kind < 2:
            for _ in range(1 if kind == 0 else 8):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[rng.randrange(len(data)) :]
        else:  # one member's bytes over another's
            a, b = rng.sample(places, 2)
            size = rng.randrange(30, 200)
            data[a : a + size] = whole[b : b + size]
        path = tmp_path / "mutated.pt"
        path.write_bytes(data)
        try:
            found = archive.read(path)
        except UserError:
            refused += 1
        else:
            assert_same(found, expected)
    assert 500 < refused < 1000


def test_a_type_that_pytorch_files_do_not_have_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"a\.b \(uint64\)"):
        archive.write(tmp_path / "file.pt", {"a.b": np.zeros(2, np.uint64)})
    assert not list(tmp_path.iterdir())
