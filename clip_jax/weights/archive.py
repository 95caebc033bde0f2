"""PyTorch files read and written without PyTorch, and without running anything that is in them.

Both kinds are zip archives: `<root>/data.pkl` is a pickle that describes objects, `<root>/data/<key>` is the raw
content of one storage. A `torch.save` file holds a dict of tensors; a TorchScript archive (`torch.jit.save`, OpenAI's
released files) holds a tree of modules whose attributes are tensors, and code that is of no interest here.

The pickle is read by a machine of our own (clip_jax/weights/pickles.py). Storages are mapped into memory, not read, and
every member's name and CRC-32 are checked: a file that was damaged on its way is an error, never other numbers. The
memory that checking or writing takes is that of one storage.
"""

import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.files import whole
from clip_jax.weights.pickles import STORAGES, Damaged, Shell, Unpickler, pickled, short
from clip_jax.weights.streaming import give_back, raw, specs_of

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
    except Damaged as error:
        raise UserError(f"{path}: {error}") from error


def is_torchscript(path: Path) -> bool:
    """Returns whether an archive that can be read holds modules, not a dict."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Archive:
    """A zip archive whose members are stored as they are, looked at through memory."""

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                if file.read(2) == b"\x80\x02":
                    raise Damaged(
                        "a bare pickle, as PyTorch wrote before version 1.6; open it with PyTorch and save it "
                        "again: torch.save(torch.load(path, weights_only=True), path)"
                    )
                with zipfile.ZipFile(file) as archive:  # reads the directory at the file's end, and no member
                    listed = archive.infolist()
                self._content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
            raise Damaged(f"not a PyTorch file, or a damaged one: {error}") from error
        except OSError as error:
            raise Damaged(f"cannot be read: {error.strerror or error}") from error
        self._members = {info.filename: info for info in listed}
        self._checked: dict[str, memoryview] = {}  # members' content; many tensors can share one
        self._taken = 0  # bytes of them
        if len(self._members) != len(listed):
            raise Damaged("two members have the same name")
        strange = [name for name in self._members if name.startswith("/") or ".." in name.split("/") or "\\" in name]
        if strange:
            raise Damaged(f"a member is called {short(strange[0])!r}, which leads out of the archive")
        roots = [
            name.removesuffix("data.pkl")
            for name in self._members
            if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise Damaged(f"not a PyTorch file: {len(roots)} members are called <root>/data.pkl, not one")
        self._root = roots[0]

    def load(self) -> Any:
        """Returns what the pickle describes, tensors as NumPy arrays."""
        if f"{self._root}byteorder" in self._members and bytes(self._member("byteorder")) != b"little":
            raise Damaged("its numbers are big-endian; save it again on another machine")
        data = bytes(self._member("data.pkl", limit=LARGEST_PICKLE))
        try:
            return Unpickler(data, self._storage).load()
        except Damaged:
            raise
        except Exception as error:  # what the pickle machine stumbles over can be of any kind
            raise Damaged(f"its pickle is damaged: {type(error).__name__}: {short(error)}") from error

    def _storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if len(key) > LONGEST_NAME:
            raise Damaged(f"its pickle refers to storage {short(key)!r}")
        content = self._member(f"data/{key}")
        if count < 0 or len(content) != count * dtype.itemsize:
            raise Damaged(f"storage {key} has {len(content)} bytes, not {count} × {dtype.itemsize}")
        return np.frombuffer(content, dtype)

    def _member(self, name: str, limit: int | None = None) -> memoryview:
        """Returns the content of a member, which is stored uncompressed and undamaged."""
        if name in self._checked:
            return self._checked[name]
        info = self._members.get(self._root + name)
        if info is None:
            raise Damaged(f"member {name!r} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Damaged(f"member {name!r} is compressed; PyTorch stores them as they are")
        if limit is not None and info.file_size > limit:
            raise Damaged(f"member {name!r} has {info.file_size} bytes, more than {limit}")
        header = bytes(self._content[info.header_offset : info.header_offset + 30])
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise Damaged(f"member {name!r} has no header where the directory says")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        recorded = bytes(self._content[info.header_offset + 30 : info.header_offset + 30 + name_size])
        if recorded != info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437"):
            raise Damaged(f"member {name!r} has another name in its own header than in the directory")
        start = info.header_offset + 30 + name_size + extra_size
        content = self._content[start : start + info.file_size]
        if len(content) != info.file_size:
            raise Damaged(f"member {name!r} is cut short: the file is truncated")
        self._taken += len(content)
        if self._taken > len(self._content):
            raise Damaged("its members overlap")
        if zlib.crc32(content) != info.CRC:
            raise Damaged(f"member {name!r} is damaged: its CRC-32 is not the one recorded")
        give_back(content)
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
        elif isinstance(node, dict | Shell):
            children = node if isinstance(node, dict) else node.attributes
            seen += len(children)
            if seen > LARGEST_TREE:
                raise Damaged(f"more than {LARGEST_TREE} objects")
            if children and len(name) + max(len(str(key)) for key in children) >= LONGEST_NAME:
                raise Damaged(f"a name is longer than {LONGEST_NAME} characters: {short(name)}…")
            waiting += [(f"{name}.{key}" if name else str(key), child) for key, child in reversed(children.items())]
    return _unwrapped(found)


def _unwrapped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors without the wrappings that training code leaves around them."""
    for wrapping in ("state_dict.", "module."):
        inside = {name.removeprefix(wrapping): x for name, x in tensors.items() if name.startswith(wrapping)}
        if inside and (wrapping == "state_dict." or len(inside) == len(tensors)):
            tensors = inside
    return tensors


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the tensors as `torch.save` writes an ordered dict of them, each with a storage of its own.

    The same tensors give the same bytes. Written whole or not at all.

    Raises:
        UserError: a dtype that PyTorch files do not have, or a file that cannot be written.
    """
    specs = specs_of(tensors)
    if unknown := [f"{name} ({x.dtype})" for name, x in specs.items() if x.dtype not in STORAGES.values()]:
        raise UserError(f"PyTorch files have no such type: {', '.join(unknown)}; convert it to float32 or int64")
    keys = {name: str(key) for key, name in enumerate(specs)}
    with whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", np.frombuffer(pickled(specs, keys), np.uint8))
        _add(archive, "byteorder", np.frombuffer(b"little", np.uint8))
        for name, x in tensors.items():
            _add(archive, f"data/{keys[name]}", x)
            give_back(x)
            del x  # else it would be there until the next one is
        _add(archive, "version", np.frombuffer(b"3\n", np.uint8))


def _add(archive: zipfile.ZipFile, name: str, x: np.ndarray) -> None:
    """Writes one member, the bytes of an array."""
    info = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    info.file_size = x.nbytes
    info.extra = _padding(archive.start_dir + 30 + len(info.filename))
    with archive.open(info, "w") as member:
        for piece in raw(x):
            member.write(piece.data)


def _padding(offset: int) -> bytes:
    """Returns an extra field after which content begins at a multiple of 64 bytes, as PyTorch maps it best."""
    size = -(offset + 4) % ALIGNMENT
    return b"FB" + struct.pack("<H", size) + b"Z" * size
