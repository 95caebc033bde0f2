"""PyTorch files read and written without PyTorch, and without running anything that is in them.

Both kinds are zip archives: `<root>/data.pkl` is a pickle that describes objects, `<root>/data/<key>` is the raw
content of one storage. A `torch.save` file holds a dict of tensors; a TorchScript archive (`torch.jit.save`, OpenAI's
released files) holds a tree of modules whose attributes are tensors, and code that is of no interest here.

A pickle is a program. Ours may only name what rebuilds a tensor, ordered dicts, and the empty shells of TorchScript
modules; everything else is refused by name before anything is called. Storages are mapped into memory, not read, and
every member's CRC-32 is checked: a file that was damaged on its way is an error, never other numbers.
"""

import collections
import dataclasses
import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.errors import UserError
from clip_jax.files import whole

# torch's name of a storage's type → what its elements are
STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

ALIGNMENT = 64  # bytes
LARGEST_PICKLE = 64 << 20  # bytes; ViT-bigG's has 0.2 MB
LARGEST_TREE = 1_000_000  # objects; a pickle can refer to one object many times over


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by their dotted names, as read-only views of the file in memory.

    A dict under "state_dict", and names that all begin with "module.", are unwrapped.

    Raises:
        UserError: not such a file, a damaged one, or one whose pickle names anything that is not a tensor's.
    """
    try:
        return _flatten(_Archive(path).load())
    except _Damaged as error:
        raise UserError(f"{path}: {error}") from error


class _Damaged(Exception):
    """What is wrong with a file; `read` adds whose it is."""


@dataclasses.dataclass
class _StorageType:
    """Stands for `torch.FloatStorage` and its kind in a pickle."""

    dtype: np.dtype


class _Shell:
    """Stands for an instance of any TorchScript class: its attributes, without its behaviour."""

    attributes: dict[str, Any] = {}  # noqa: RUF012 (of one that has none; never written)

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _rebuild_tensor(storage, offset, size, stride, *_) -> np.ndarray:
    """Returns the view that `torch._utils._rebuild_tensor_v2` would make; nothing outside the storage can be seen."""
    if not isinstance(storage, np.ndarray) or len(size) != len(stride):
        raise _Damaged("a tensor that is not built on a storage")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise _Damaged(f"a tensor of size {size}, stride {stride} at {offset}")
    if len(size) > 32 or math.prod(size) > len(storage):
        raise _Damaged(f"a tensor of size {size} in a storage of {len(storage)} elements")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    if last >= len(storage) or offset > len(storage):
        raise _Damaged(f"a tensor of size {size}, stride {stride} at {offset} in a storage of {len(storage)} elements")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _rebuild_parameter(tensor, *_) -> np.ndarray:
    return tensor


# All that a pickle may name, apart from `torch.…Storage` and `__torch__.…`.
KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    """Builds what `KNOWN` and the two name spaces allow, and refuses every other name."""

    def __init__(self, data: bytes, storage):
        super().__init__(io.BytesIO(data))
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        if module == "__torch__" or module.startswith("__torch__."):
            return _Shell
        raise _Damaged(f"its pickle asks for {module}.{name}, which is no part of a tensor: refused, nothing was run")

    def persistent_load(self, pid: Any) -> np.ndarray:
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), _, int(count)):
                return self._storage(key, dtype, count)
        raise _Damaged(f"its pickle refers to {pid!r}, which is no storage")


class _Archive:
    """A zip archive whose members are stored as they are, looked at through memory."""

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                if file.read(2) == b"\x80\x02":
                    raise _Damaged(
                        "a bare pickle, as PyTorch wrote before version 1.6; open it with PyTorch and save it "
                        "again: torch.save(torch.load(path, weights_only=True), path)"
                    )
                with zipfile.ZipFile(file) as archive:  # reads the directory at the file's end, and no member
                    self._members = {info.filename: info for info in archive.infolist()}
                self._content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
            raise _Damaged(f"not a PyTorch file, or a damaged one: {error}") from error
        except OSError as error:
            raise _Damaged(f"cannot be read: {error.strerror or error}") from error
        strange = [name for name in self._members if name.startswith("/") or ".." in name.split("/") or "\\" in name]
        if strange:
            raise _Damaged(f"a member is called {strange[0]!r}, which leads out of the archive")
        roots = [
            name.removesuffix("data.pkl")
            for name in self._members
            if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise _Damaged(f"not a PyTorch file: {len(roots)} members are called <root>/data.pkl, not one")
        self._root = roots[0]

    def load(self) -> Any:
        """Returns what the pickle describes, tensors as NumPy arrays."""
        if f"{self._root}byteorder" in self._members and bytes(self._member("byteorder")) != b"little":
            raise _Damaged("its numbers are big-endian; save it again on another machine")
        data = bytes(self._member("data.pkl", limit=LARGEST_PICKLE))
        try:
            _check_opcodes(data)
            return _Unpickler(data, self._storage).load()
        except _Damaged:
            raise
        except Exception as error:  # what the pickle machine stumbles over can be of any kind
            raise _Damaged(f"its pickle is damaged: {type(error).__name__}: {error}") from error

    def _storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        content = self._member(f"data/{key}")
        if count < 0 or len(content) != count * dtype.itemsize:
            raise _Damaged(f"storage {key} has {len(content)} bytes, not {count} × {dtype.itemsize}")
        return np.frombuffer(content, dtype)

    def _member(self, name: str, limit: int | None = None) -> memoryview:
        """Returns the content of a member, which is stored uncompressed and undamaged."""
        info = self._members.get(self._root + name)
        if info is None:
            raise _Damaged(f"member {name!r} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise _Damaged(f"member {name!r} is compressed; PyTorch stores them as they are")
        if limit is not None and info.file_size > limit:
            raise _Damaged(f"member {name!r} has {info.file_size} bytes, more than {limit}")
        header = bytes(self._content[info.header_offset : info.header_offset + 30])
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise _Damaged(f"member {name!r} has no header where the directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        content = self._content[start : start + info.file_size]
        if len(content) != info.file_size:
            raise _Damaged(f"member {name!r} is cut short: the file is truncated")
        if zlib.crc32(content) != info.CRC:
            raise _Damaged(f"member {name!r} is damaged: its CRC-32 is not the one recorded")
        return content


# What PyTorch's picklers use, and nothing that calls or imports in another way.
OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK MEMOIZE GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT NONE NEWTRUE NEWFALSE
    BININT BININT1 BININT2 LONG1 INT LONG BINFLOAT BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
    """.split()  # noqa: SIM905 (fifty quoted words are harder to read)
)


def _check_opcodes(data: bytes) -> None:
    """Raises `_Damaged` for an opcode PyTorch does not use, or a memo index that would take gigabytes to hold."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise _Damaged(f"its pickle uses {opcode.name}, which describes no tensor: refused, nothing was run")
        if "PUT" in opcode.name and int(argument) > len(data):
            raise _Damaged(f"its pickle numbers an object {argument}, of at most {len(data)}")


def _flatten(tree: Any) -> dict[str, np.ndarray]:
    """Returns all tensors of nested dicts and modules by dotted name."""
    found: dict[str, np.ndarray] = {}
    waiting, seen = [("", tree)], 0
    while waiting:
        name, node = waiting.pop()
        seen += 1
        if seen > LARGEST_TREE:
            raise _Damaged(f"more than {LARGEST_TREE} objects")
        if isinstance(node, np.ndarray):
            found[name] = node
        elif isinstance(node, dict | _Shell):
            children = node if isinstance(node, dict) else node.attributes
            waiting += [(f"{name}.{key}" if name else str(key), child) for key, child in reversed(children.items())]
    return _unwrapped(found)


def _unwrapped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors without the wrappings that training code leaves around them."""
    for wrapping in ("state_dict.", "module."):
        inside = {name.removeprefix(wrapping): x for name, x in tensors.items() if name.startswith(wrapping)}
        if inside and (wrapping == "state_dict." or len(inside) == len(tensors)):
            tensors = inside
    return tensors


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes the tensors as `torch.save` writes an ordered dict of them, each with a storage of its own.

    The same tensors give the same bytes. Written whole or not at all.

    Raises:
        UserError: a dtype that PyTorch files do not have, or a file that cannot be written.
    """
    names = {dtype: name for name, dtype in STORAGES.items()}
    if unknown := [f"{name} ({x.dtype})" for name, x in tensors.items() if x.dtype not in names]:
        raise UserError(f"PyTorch files have no such type: {', '.join(unknown)}; convert it to float32 or int64")
    members = {"data.pkl": _pickled(tensors, names), "byteorder": b"little"}
    members |= {
        f"data/{key}": np.ascontiguousarray(x).reshape(-1).view(np.uint8) for key, x in enumerate(tensors.values())
    }
    members["version"] = b"3\n"
    with whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            info.extra = _padding(archive.start_dir + 30 + len(info.filename))
            archive.writestr(info, memoryview(content))


def _padding(offset: int) -> bytes:
    """Returns an extra field after which content begins at a multiple of 64 bytes, as PyTorch maps it best."""
    size = -(offset + 4) % ALIGNMENT
    return b"FB" + struct.pack("<H", size) + b"Z" * size


def _pickled(tensors: dict[str, np.ndarray], names: dict[np.dtype, str]) -> bytes:
    """Returns the pickle of an OrderedDict of tensors, opcode by opcode: pickle itself would have to import torch."""

    def text(word: str) -> bytes:
        data = word.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(data)) + data

    def number(n: int) -> bytes:
        size = n.bit_length() // 8 + 1
        return pickle.LONG1 + bytes([size]) + n.to_bytes(size, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    ordered_dict = named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    out = [pickle.PROTO, b"\x02", ordered_dict, pickle.MARK]
    for key, (name, x) in enumerate(tensors.items()):
        storage = [text("storage"), named("torch", names[x.dtype]), text(str(key)), text("cpu"), number(x.size)]
        strides = tuple(math.prod(x.shape[i + 1 :]) for i in range(x.ndim))
        out += [text(name), named("torch._utils", "_rebuild_tensor_v2"), pickle.MARK]
        out += [pickle.MARK, *storage, pickle.TUPLE, pickle.BINPERSID]
        out += [
            number(0),
            numbers(x.shape),
            numbers(strides),
            pickle.NEWFALSE,
            ordered_dict,
            pickle.TUPLE,
            pickle.REDUCE,
        ]
    out += [pickle.SETITEMS, pickle.STOP]
    return b"".join(out)
