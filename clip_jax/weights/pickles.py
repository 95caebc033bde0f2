"""The pickles of PyTorch's files, read on a machine of our own and written opcode by opcode.

A pickle is a program. Ours knows PyTorch's opcodes alone: it may only name what rebuilds a tensor, ordered dicts, and
the empty shells of TorchScript modules; everything else is refused by name before anything is called, and nothing
outside the machine can be set.
"""

import dataclasses
import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

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


class Damaged(Exception):
    """What is wrong with a file; who reads it adds whose it is."""


def short(text: Any) -> str:
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
class Shell:
    """Stands for an instance of any TorchScript class: its attributes, without its behaviour."""

    attributes: dict[str | int, Any]


def _rebuild_tensor(storage, offset, size, stride, *_) -> np.ndarray:
    """Returns the view that `torch._utils._rebuild_tensor_v2` would make; nothing outside the storage can be seen."""
    if not isinstance(storage, np.ndarray) or type(size) is not tuple or type(stride) is not tuple:
        raise Damaged("a tensor that is not built on a storage")
    if len(size) != len(stride) or len(size) > 32:
        raise Damaged(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in (offset, *size, *stride)):
        raise Damaged("a tensor whose size, strides or offset are not whole numbers from 0 up")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    if math.prod(size) > len(storage) or last >= len(storage) or offset > len(storage):
        raise Damaged(f"a tensor of size {size}, stride {stride} at {offset} in a storage of {len(storage)} elements")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _rebuild_parameter(tensor, *_) -> np.ndarray:
    return tensor


def _ordered_dict() -> dict:
    return {}  # without arguments: PyTorch fills it afterwards, and a copy of a copy of a copy would fill the memory


def _shell() -> Shell:
    return Shell({})


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
    asked = short(f"{module}.{name}")
    raise Damaged(f"its pickle asks for {asked}, which is no part of a tensor: refused, nothing was run")


class Unpickler:
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
                raise Damaged(f"its pickle uses {opcode}, which describes no tensor: refused, nothing was run")

    def _since_mark(self) -> list[Any]:
        """Takes from the stack all that lies above the last mark."""
        place = self._marks.pop()
        if not 0 <= place <= len(self._stack):
            raise Damaged("its pickle is damaged: a mark is out of place")
        items = self._stack[place:]
        del self._stack[place:]
        return items

    def _set(self, target: dict, items: list[Any]) -> None:
        """Puts keys and values, one after the other, into a dict, and that on the stack."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int) or (type(key) is int and key.bit_length() > 63):
                raise Damaged(f"its pickle has a dict whose key is a {type(key).__name__}: neither a name nor a number")
            target[key] = value
        self._stack.append(target)

    def _build(self, state: Any) -> None:
        """Gives a shell its attributes; a state dict's, its `_metadata`, are of no use here."""
        target = self._stack[-1]
        if isinstance(target, Shell):
            target.attributes = state if isinstance(state, dict) else {}
        else:
            _expect(target, dict)

    def _refer(self, pid: Any) -> np.ndarray:
        match pid:
            case (str("storage"), _StorageType(dtype=dtype), str(key), _, int(count)):
                return self._storage(key, dtype, count)
        raise Damaged(f"its pickle refers to a {type(pid).__name__} that is no storage")


def _expect(value: Any, kind: type) -> Any:
    """Returns the value, which has to be of the kind that an opcode works on."""
    if type(value) is not kind:
        raise Damaged(f"its pickle is damaged: a {type(value).__name__} where a {kind.__name__.strip('_')} belongs")
    return value


def pickled(specs: Mapping[str, Any], keys: Mapping[str, str]) -> bytes:
    """Returns the pickle of an OrderedDict of tensors that have these shapes and dtypes, by name, and whose storages
    have these keys; opcode by opcode, for pickle itself would have to import torch."""
    types = {dtype: name for name, dtype in STORAGES.items()}

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
    for name, x in specs.items():
        storage = [text("storage"), named("torch", types[x.dtype]), text(keys[name]), text("cpu"), number(x.size)]
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
