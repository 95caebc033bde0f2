"""PyTorch's files without PyTorch: the same tensors, nothing run, and damage is always noticed."""

import collections
import pickle
import random
import resource
import signal
import struct
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracles import require

from clip_jax.errors import UserError
from clip_jax.weights import archive, pickles

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


def shared_tensors(torch) -> dict:
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    return {
        "module.base": base,
        "module.part": base[1:3, 4:],
        "module.transposed": base.T,
        "module.half": base.half(),
        "module.bfloat16": base.to(torch.bfloat16),
        "module.long": torch.tensor(224),
        "module.parameter": torch.nn.Parameter(base[0]),
        "module.empty": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"epoch": 3, "state_dict": d}], ids=["flat", "state_dict"])
def test_we_read_what_pytorch_writes_with_shared_and_strided_storages(wrap, tmp_path):
    torch = require("torch")
    tensors = shared_tensors(torch)
    torch.save(wrap(tensors), tmp_path / "file.pt")
    expected = {name.removeprefix("module."): as_numpy(x) for name, x in tensors.items()}
    assert_same(archive.read(tmp_path / "file.pt"), expected)


def save_torchscript(torch, path: Path):
    """Writes a traced model of a few modules, and returns the model."""

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
        torch.jit.trace(model, torch.randn(5, 3)).save(path)
    return model


def test_we_read_torchscript_archives(tmp_path):
    model = save_torchscript(require("torch"), tmp_path / "script.pt")
    expected = {name: as_numpy(x) for name, x in model.state_dict().items()}
    found = archive.read(tmp_path / "script.pt")
    assert_same({name: found[name] for name in expected}, expected)
    assert found.keys() == expected.keys()


class TooSlow(BaseException):
    """Is no `Exception`, so that nothing under test takes it for its own."""


@contextmanager
def bounded(seconds: float = 5, megabytes: int = 500):
    """Limits the time that the body takes, and the memory that it adds to the most this process ever had."""

    def stop(*_):
        raise TooSlow

    before, handler = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes << 10


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
        (b"\x80\x02}r\xff\xff\xff\x7f.", ""),
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


NAMED = {name: f"c{module}\n{name}\n".encode() for module, name in pickles.KNOWN} | {
    "FloatStorage": b"ctorch\nFloatStorage\n",
    "Module": b"c__torch__.nn\nModule\n",
}
STATE = b"}X\x05\x00\x00\x00itemsK\x01s"  # {"items": 1}
DOUBLED = b"]" + b"".join(b"q\x00h\x00\x86" for _ in range(64))  # a pair of a pair of a pair …


@pytest.mark.parametrize("name", NAMED)
def test_nothing_that_a_pickle_names_can_be_set(name, tmp_path):
    path = pickled(tmp_path / "bad.pt", b"\x80\x02" + NAMED[name] + STATE + b"b.")
    with pytest.raises(UserError, match="belongs"):
        archive.read(path)
    path = pickled(tmp_path / "slots.pt", b"\x80\x02" + NAMED[name] + b"N" + STATE + b"\x86b.")
    with pytest.raises(UserError, match="belongs"):
        archive.read(path)


@pytest.mark.parametrize("state", [STATE, b"N" + STATE + b"\x86", b"X\x01\x00\x00\x00a", b"N"])
def test_what_is_set_on_a_dict_or_a_module_does_no_harm(state, tmp_path):
    for name in ("OrderedDict", "Module"):
        path = pickled(tmp_path / f"{name}.pt", b"\x80\x02" + NAMED[name] + b")R" + state + b"b.")
        assert archive.read(path) == {}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DOUBLED + b"Q.", "refers to a tuple"),
        (NAMED["_rebuild_tensor_v2"] + b"(NK\x00" + DOUBLED + b"h\x00tR.", "not built on a storage"),
        (b"}" + DOUBLED + b"K\x01s.", "key is a tuple"),
        (b"(" + DOUBLED + b"K\x01d.", "key is a tuple"),
        (b"}\x8a\x09" + b"\xff" * 8 + b"\x00K\x01s.", "key is a int"),
        (NAMED["OrderedDict"] + b"}\x85R.", "damaged"),
        (b"}X" + struct.pack("<I", 2000) + b"a" * 2000 + b"Ns.", "name is longer"),
        (b"}q\x00X\x01\x00\x00\x00ah\x00s.", "name is longer"),  # a dict in itself
        (b"}q\x00(" + b"".join(b"X\x01\x00\x00\x00%ch\x00" % c for c in range(65, 91)) + b"u.", "name|objects"),
        (b"c" + b"m" * 100_000 + b"\nn\n.", "no part of a tensor"),
        (b"(0t.", "damaged"),
        (b"K\x010t.", "damaged"),
        (b"K\x01(00t.", "damaged"),
        (b"(K\x01K\x02K\x03d.", "damaged"),
    ],
)
def test_a_pickle_that_asks_for_much_is_refused_at_once_and_in_few_words(data, words, tmp_path):
    path = pickled(tmp_path / "bad.pt", b"\x80\x02" + data)
    with bounded(), pytest.raises(UserError, match=words) as error:
        archive.read(path)
    assert len(str(error.value)) < 1000


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


def swapped(data: bytes, kind: str, a: zipfile.ZipInfo, b: zipfile.ZipInfo) -> bytes:
    """Returns an archive in which two members of equal length, of names of equal length, have exchanged something."""
    data, size = bytearray(data), len(a.filename)
    directory = struct.unpack("<I", data[-6:-2])[0]
    entries = [data.index(x.filename.encode(), directory) for x in (a, b)]  # where the directory's names begin
    headers = [x.header_offset for x in (a, b)]
    contents = [at + 30 + sum(struct.unpack("<HH", data[at + 26 : at + 30])) for at in headers]
    spans = {
        "directory's names": [[(at, size) for at in entries]],
        "headers' names": [[(at + 30, size) for at in headers]],
        "contents": [[(at, a.file_size) for at in contents]],
        "offsets": [[(at - 4, 4) for at in entries]],
        "offsets and CRCs": [[(at - 4, 4) for at in entries], [(at - 30, 4) for at in entries]],
        "contents and CRCs": [[(at, a.file_size) for at in contents], [(at - 30, 4) for at in entries]],
    }
    for (i, n), (j, _) in spans[kind]:
        data[i : i + n], data[j : j + n] = data[j : j + n], data[i : i + n]
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("directory's names", "another name"),
        ("headers' names", "another name"),
        ("contents", "CRC-32"),
        ("offsets", "another name"),
        ("offsets and CRCs", "another name"),
        ("contents and CRCs", None),  # is another file, and a sound one
    ],
)
def test_members_that_changed_places_are_noticed(kind, words, tmp_path):
    path, (x, y) = tmp_path / "file.pt", np.arange(6, dtype=np.float32).reshape(2, 3)
    archive.write(path, {"x": x, "y": y})
    with zipfile.ZipFile(path) as file:
        a, b = (file.getinfo(f"archive/data/{i}") for i in range(2))
    path.write_bytes(swapped(path.read_bytes(), kind, a, b))
    if words is None:
        assert_same(archive.read(path), {"x": y, "y": x})
    else:
        with pytest.raises(UserError, match=words):
            archive.read(path)


def rewritten(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_two_members_of_one_name_are_refused(good):
    with warnings.catch_warnings(), zipfile.ZipFile(good, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr("archive/data/0", b"")
    with pytest.raises(UserError, match="same name"):
        archive.read(good)


def test_members_that_lie_in_each_other_are_refused(tmp_path):
    path, inside = tmp_path / "file.pt", np.arange(10_000).astype(np.uint8)
    with zipfile.ZipFile(tmp_path / "inner", "w") as file:
        file.writestr("archive/data/1", inside.tobytes())
        (info,) = file.infolist()
    outside = np.frombuffer((tmp_path / "inner").read_bytes()[:10_044], np.uint8)  # with its header
    archive.write(path, {"outside": outside, "inside": inside})
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist() if name != "archive/data/1"}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
        at = file.getinfo("archive/data/0").header_offset
        info.header_offset = at + 30 + len("archive/data/0")
        file.filelist.append(info)
    with pytest.raises(UserError, match="overlap"):
        archive.read(path)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Returns a pickle with some bytes changed, taken out, repeated, or made opcodes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, to, size = rng.randrange(len(out)), rng.randrange(len(out)), rng.randrange(1, 40)
        match rng.randrange(5):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice(b"()].}RbQuUsetaN012\x81\x85\x86\x87\x8ahqjrcKMJX")
            case 2:
                del out[at : min(at + size, len(out) - 1)]
            case 3:
                out[to:to] = out[at : at + size]
            case 4:
                out[to : to + size] = out[at : at + size]
    return bytes(out)


@pytest.mark.parametrize("kind", ["ours", "shared", "script"])
def test_mutated_pickles_with_right_crcs_give_tensors_or_our_error(kind, tmp_path):
    path, rng = tmp_path / "file.pt", random.Random(0)
    if kind == "ours":
        archive.write(path, some_tensors())
    elif kind == "shared":
        torch = require("torch")
        torch.save(shared_tensors(torch), path)
    else:
        save_torchscript(require("torch"), path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist() if "/code/" not in name}
    (name,) = (name for name in members if name.endswith("/data.pkl"))
    most, loaded = max(map(len, members.values())), 0
    for _ in range(1000 if kind == "ours" else 500):
        rewritten(path, members | {name: mutated(members[name], rng)})
        with bounded(seconds=2, megabytes=100):
            try:
                found = archive.read(path)
            except UserError:
                continue
        loaded += 1
        assert all(x.nbytes <= most and x.tobytes() is not None for x in found.values())
    assert 10 < loaded < 950


def test_a_type_that_pytorch_files_do_not_have_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"a\.b \(uint64\)"):
        archive.write(tmp_path / "file.pt", {"a.b": np.zeros(2, np.uint64)})
    assert not list(tmp_path.iterdir())
