"""PyTorch files read and written without PyTorch, and without running anything that is in them.

Both kinds are zip archives: `<root>/data.pkl` is a pickle that describes objects, `<root>/data/<key>` is the raw
content of one storage. A `torch.save` file holds a dict of tensors; a TorchScript archive (`torch.jit.save`, OpenAI's
released files) holds a tree of modules whose attributes are tensors, and code that is of no interest here.

A pickle is a program. We run it on a machine of our own, which knows PyTorch's opcodes alone: it may only name what
rebuilds a tensor, ordered dicts, and the empty shells of TorchScript modules; everything else is refused by name before
anything is called, and nothing outside the machine can be set. Storages are mapped into memory, not read, and every
member's name and CRC-32 are checked: a file that was damaged on its way is an error, never other numbers.
"""

import dataclasses
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
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
UTF8 = 0x800  # the flag of a zip archive's member whose name is UTF-8
LARGEST_PICKLE = 8 << 20  # bytes; ViT-bigG's has 0.2 MB
LARGEST_TREE = 200_000  # objects; a pickle can refer to one object many times over
LONGEST_NAME = 1000  # characters of a tensor's dotted name


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


def is_torchscript(path: Path) -> bool:
    """Returns whether an archive that can be read holds modules, not a dict."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Damaged(Exception):
    """What is wrong with a file; `read` adds whose it is."""


def _short(text: Any) -> str:
    """Returns the beginning of a text that comes from the file, for a message."""
    text = str(text)
    return text if len(text) <= 200 else f"{text[:200]}…"


@dataclasses.dataclass(frozen=True, slots=True)
class _StorageType:
    """Stands for `torch.FloatStorage` and its kind in a pickle."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True, slots=True)
class _Function:
    """Stands for a function or class that a pickle may call."""

    call: Callable[..., Any]


@dataclasses.dataclass(slots=True)
class _Shell:
    """Stands for an instance of any TorchScript class: its attributes, without its behaviour."""

    attributes: dict[str | int, Any]


def _rebuild_tensor(storage, offset, size, stride, *_) -> np.ndarray:
    """Returns the view that `torch._utils._rebuild_tensor_v2` would make; nothing outside the storage can be seen."""
    if not isinstance(storage, np.ndarray) or type(size) is not tuple or type(stride) is not tuple:
        raise _Damaged("a tensor that is not built on a storage")
    if len(size) != len(stride) or len(size) > 32:
        raise _Damaged(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in (offset, *size, *stride)):
        raise _Damaged("a tensor whose size, strides or offset are not whole numbers from 0 up")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    if math.prod(size) > len(storage) or last >= len(storage) or offset > len(storage):
        raise _Damaged(f"a tensor of size {size}, stride {stride} at {offset} in a storage of {len(storage)} elements")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _rebuild_parameter(tensor, *_) -> np.ndarray:
    return tensor


def _ordered_dict() -> dict:
    return {}  # without arguments: PyTorch fills it afterwards, and a copy of a copy of a copy would fill the memory


def _shell() -> _Shell:
    return _Shell({})


# All that a pickle may name, apart from `torch.…Storage` and `__torch__.…`.
KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("collections", "OrderedDict"): _Function(_ordered_dict),
}


def _named(module: str, name: str) -> _Function | _StorageType:
    """Returns what stands for a name in a pickle."""
    if (module, name) in KNOWN:
        return KNOWN[module, name]
    if module == "torch" and name in STORAGES:
        return _StorageType(STORAGES[name])
    if module == "__torch__" or module.startswith("__torch__."):
        return _Function(_shell)
    asked = _short(f"{module}.{name}")
    raise _Damaged(f"its pickle asks for {asked}, which is no part of a tensor: refused, nothing was run")


class _Unpickler:
    """A pickle machine of the opcodes that PyTorch uses.

    Python's own would set attributes of whatever is on its stack, call all that can be called, and hash any key, which
    takes for ever where a tuple holds one tuple twice, and so on down.
    """

    def __init__(self, data: bytes, storage: Callable[[str, np.dtype, int], np.ndarray]):
        self._data, self._storage = data, storage
        self._stack: list[Any] = []
        self._marks: list[int] = []  # places in the stack
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Returns the object that the pickle describes."""
        for opcode, argument, _ in pickletools.genops(self._data):  # raises ValueError where no STOP ends it
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "INT" | "LONG" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode]())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._since_mark()
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._marks.append(len(stack) - int(opcode[-1]))
                stack.append(tuple(self._since_mark()))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "LIST":
                stack.append(self._since_mark())
            case "DICT":
                items = self._since_mark()
                self._set({}, items)
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode == "APPEND" else self._since_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                if opcode == "SETITEM":
                    self._marks.append(len(stack) - 2)
                items = self._since_mark()
                self._set(_expect(stack.pop(), dict), items)
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(_named(module, name))
            case "STACK_GLOBAL":
                name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                stack.append(_named(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = _expect(stack.pop(), tuple), _expect(stack.pop(), _Function)
                stack.append(function.call(*arguments))
            case "BUILD":
                self._build(stack.pop())
            case "BINPERSID":
                stack.append(self._refer(stack.pop()))
            case _:
                raise _Damaged(f"its pickle uses {opcode}, which describes no tensor: refused, nothing was run")

    def _since_mark(self) -> list[Any]:
        """Takes from the stack all that lies above the last mark."""
        place = self._marks.pop()
        if not 0 <= place <= len(self._stack):
            raise _Damaged("its pickle is damaged: a mark is out of place")
        items = self._stack[place:]
        del self._stack[place:]
        return items

    def _set(self, target: dict, items: list[Any]) -> None:
        """Puts keys and values, one after the other, into a dict, and that on the stack."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int) or (type(key) is int and key.bit_length() > 63):
                raise _Damaged(
                    f"its pickle has a dict whose key is a {type(key).__name__}: neither a name nor a number"
                )
            target[key] = value
        self._stack.append(target)

    def _build(self, state: Any) -> None:
        """Gives a shell its attributes; a state dict's, its `_metadata`, are of no use here."""
        target = self._stack[-1]
        if isinstance(target, _Shell):
            target.attributes = state if isinstance(state, dict) else {}
        else:
            _expect(target, dict)

    def _refer(self, pid: Any) -> np.ndarray:
        match pid:
            case (str("storage"), _StorageType(dtype=dtype), str(key), _, int(count)):
                return self._storage(key, dtype, count)
        raise _Damaged(f"its pickle refers to a {type(pid).__name__} that is no storage")


def _expect(value: Any, kind: type) -> Any:
    """Returns the value, which has to be of the kind that an opcode works on."""
    if type(value) is not kind:
        raise _Damaged(f"its pickle is damaged: a {type(value).__name__} where a {kind.__name__.strip('_')} belongs")
    return value


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
                    listed = archive.infolist()
                self._content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
            raise _Damaged(f"not a PyTorch file, or a damaged one: {error}") from error
        except OSError as error:
            raise _Damaged(f"cannot be read: {error.strerror or error}") from error
        self._members = {info.filename: info for info in listed}
        self._checked: dict[str, memoryview] = {}  # members' content; many tensors can share one
        self._taken = 0  # bytes of them
        if len(self._members) != len(listed):
            raise _Damaged("two members have the same name")
        strange = [name for name in self._members if name.startswith("/") or ".." in name.split("/") or "\\" in name]
        if strange:
            raise _Damaged(f"a member is called {_short(strange[0])!r}, which leads out of the archive")
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
            return _Unpickler(data, self._storage).load()
        except _Damaged:
            raise
        except Exception as error:  # what the pickle machine stumbles over can be of any kind
            raise _Damaged(f"its pickle is damaged: {type(error).__name__}: {_short(error)}") from error

    def _storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if len(key) > LONGEST_NAME:
            raise _Damaged(f"its pickle refers to storage {_short(key)!r}")
        content = self._member(f"data/{key}")
        if count < 0 or len(content) != count * dtype.itemsize:
            raise _Damaged(f"storage {key} has {len(content)} bytes, not {count} × {dtype.itemsize}")
        return np.frombuffer(content, dtype)

    def _member(self, name: str, limit: int | None = None) -> memoryview:
        """Returns the content of a member, which is stored uncompressed and undamaged."""
        if name in self._checked:
            return self._checked[name]
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
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        recorded = bytes(self._content[info.header_offset + 30 : info.header_offset + 30 + name_size])
        if recorded != info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437"):
            raise _Damaged(f"member {name!r} has another name in its own header than in the directory")
        start = info.header_offset + 30 + name_size + extra_size
        content = self._content[start : start + info.file_size]
        if len(content) != info.file_size:
            raise _Damaged(f"member {name!r} is cut short: the file is truncated")
        self._taken += len(content)
        if self._taken > len(self._content):
            raise _Damaged("its members overlap")
        if zlib.crc32(content) != info.CRC:
            raise _Damaged(f"member {name!r} is damaged: its CRC-32 is not the one recorded")
        self._checked[name] = content
        return content


def _flatten(tree: Any) -> dict[str, np.ndarray]:
    """Returns all tensors of nested dicts and modules by dotted name."""
    found: dict[str, np.ndarray] = {}
    waiting, seen = [("", tree)], 0
    while waiting:
        name, node = waiting.pop()
        if isinstance(node, np.ndarray):
            found[name] = node
        elif isinstance(node, dict | _Shell):
            children = node if isinstance(node, dict) else node.attributes
            seen += len(children)
            if seen > LARGEST_TREE:
                raise _Damaged(f"more than {LARGEST_TREE} objects")
            if children and len(name) + max(len(str(key)) for key in children) >= LONGEST_NAME:
                raise _Damaged(f"a name is longer than {LONGEST_NAME} characters: {_short(name)}…")
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
