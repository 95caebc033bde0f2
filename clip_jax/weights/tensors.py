"""Files of tensors: safetensors read and written, PyTorch's told apart from them, and models in several files.

Whatever is read is a view of the file in memory, and what is written is written one tensor after the other: neither
takes memory for the whole.
"""

import json
import mmap
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from clip_jax.errors import UserError
from clip_jax.files import read_json
from clip_jax.weights import archive
from clip_jax.weights.mapping import listed
from clip_jax.weights.streaming import give_back, raw, specs_of

# safetensors' name of a type → what its elements are; in a file those that stand further down come first
DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}
INDEX = ".index.json"  # Hugging Face's: {"weight_map": {tensor: file}}
PYTORCH = (b"PK\x03\x04", b"\x80\x02")  # how a zip archive and a bare pickle begin


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors or a PyTorch file, whatever it is called, as views of the file in memory.

    Raises:
        UserError: a file of another kind, or a damaged one.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head[8:] == b"{":
        return read_safetensors(path)
    if head.startswith(PYTORCH):
        return archive.read(path)
    raise UserError(f"{path}: neither a safetensors file nor one of PyTorch's, or a damaged one")


def read_first(folder: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], Path]:
    """Returns the tensors in the first of these files that is in the folder, and the file.

    A name that ends in `.index.json` is an index: the tensors are in the files that it names, and all of these count.

    Raises:
        UserError: none of them is there, one cannot be read, or an index and its files disagree; with all causes.
    """
    path = next((folder / name for name in names if os.path.lexists(folder / name)), None)
    if path is None:
        raise UserError(f"{folder} has no weights: none of {', '.join(names)}")
    return (_read_shards(path) if path.name.endswith(INDEX) else read_file(path)), path


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file by their names, as read-only views of the file in memory.

    Raises:
        UserError: not such a file, a damaged one, or one with a type that is not in `DTYPES`.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # the library has checked now that all tensors lie in the file, none on another
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or a damaged one: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    start = 8 + int.from_bytes(content[:8], "little")
    header = {name: entry for name, entry in json.loads(content[8:start]).items() if name != "__metadata__"}
    if unknown := [f"{name} ({entry['dtype']})" for name, entry in header.items() if entry["dtype"] not in DTYPES]:
        raise UserError(f"{path}: types that no model here has: {listed(unknown)}")
    return {
        name: np.ndarray(entry["shape"], DTYPES[entry["dtype"]], content, start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as a safetensors file, the bytes that the library would write, which needs them all at once.

    The file is written in place: `path` is a temporary, or the folder is nobody's yet.

    Raises:
        UserError: a dtype that safetensors files do not have.
        OSError: the file cannot be written.
    """
    specs, names = specs_of(tensors), {dtype: name for name, dtype in DTYPES.items()}
    if unknown := [f"{name} ({x.dtype})" for name, x in specs.items() if x.dtype not in names]:
        raise UserError(f"safetensors files here have no such type: {listed(unknown)}; convert it to float32 or int64")
    ranks = {name: -list(DTYPES).index(names[x.dtype]) for name, x in specs.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    places, end = {}, 0
    for name in sorted(specs, key=lambda name: (ranks[name], name)):  # each at a multiple of its elements
        x, places[name] = specs[name], end
        end += x.size * x.dtype.itemsize
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, x in tensors.items():
            file.seek(8 + len(text) + places[name])
            _write(file, x)
            del x  # else it would be there until the next one is


def _write(file: BinaryIO, x: np.ndarray) -> None:
    for piece in raw(x):
        file.write(piece)
    give_back(x)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of all files that an index names."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: weight_map={reprlib.repr(weight_map)} should say the file of each tensor")
    tensors: dict[str, np.ndarray] = {}
    problems, absent = [], []
    for file in sorted(set(weight_map.values())):
        try:
            shard = read_file(_inside(index.parent, file))
        except UserError as error:
            problems.append(str(error))
            continue
        absent += [f"{name} ({file})" for name, its in weight_map.items() if its == file and name not in shard]
        tensors |= {name: x for name, x in shard.items() if weight_map.get(name, file) == file}
    if absent:
        problems.append(f"tensors that are not in the file it says ({len(absent)}): {listed(absent)}")
    if problems:
        raise UserError(f"{index}: {'; '.join(problems)}; fetch what is missing, or the whole model again")
    return tensors


def _inside(folder: Path, file: str) -> Path:
    """Returns the path of a file that an index names, which is in the index's folder."""
    name = PurePosixPath(file)
    if name.is_absolute() or ".." in name.parts or not name.parts or re.search(r"[\\\0]", file):
        raise UserError(f"it names the file {reprlib.repr(file)}, which leads out of the folder")
    return folder / name
