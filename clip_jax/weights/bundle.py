"""An architecture with its weights on the host, and our own format for the two: a folder that needs no table.

FOLDER/config.json         {"format": "clip_jax", "variant": …, "architecture": …}
FOLDER/model.safetensors   parameters and statistics by our paths, in the dtypes they came in
FOLDER/tokenizer.json      the tokenizer, where it is not CLIP's own

A run's folder has a `config.json` too (clip_jax/workdir.py), with "config" and no "format": `is_bundle` tells them
apart by what is in them.
"""

import contextlib
import dataclasses
import json
import mmap
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from clip_jax.architecture import Architecture
from clip_jax.config import build
from clip_jax.errors import UserError
from clip_jax.files import is_temporary, read_text, whole
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.tokenizer.file import FILE_NAME
from clip_jax.weights.mapping import DType, Rule, flatten, import_tensors, listed

FORMAT = "clip_jax"
CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", FILE_NAME

# safetensors' name of a type → what its elements are
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An architecture and its weights: NumPy arrays by our paths, in the dtypes of their source."""

    architecture: Architecture
    arrays: Mapping[str, np.ndarray]
    variant: str  # the architecture's name
    origin: str  # where the weights come from
    tokenizer: str | None = None  # what its tokenizer.json says, where `architecture.tokenize.kind` is "file"
    results: Path | None = None  # where their evaluations go unless told otherwise; None: they are no run's


def variant_of(architecture: Architecture, otherwise: str) -> str:
    """Returns the name that an architecture has in the table of variants, or `otherwise` when it is not there."""
    return next((name for name, known in VARIANTS.items() if known == architecture), otherwise)


def is_bundle(path: Path) -> bool:
    """Returns whether the folder says that it holds a model in our format; a run's folder does not."""
    try:
        content = read_json(path / CONFIG)
    except UserError:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_folder(path: Path, dtype: DType | None = None) -> Bundle:
    """Returns the model in a folder of our format; floats in `dtype`, or where that is None as they are.

    Raises:
        UserError: not such a folder, a damaged one, or tensors that are not those of its architecture; all of them.
    """
    content = _read_config(path / CONFIG)
    try:
        architecture = build(Architecture, content["architecture"])
    except UserError as error:
        raise UserError(f"{path / CONFIG}: architecture: {error}") from error
    shapes = flatten(Definition(architecture).shapes())
    names_are_paths = [Rule(name, name, "... -> ...") for name in shapes]
    tensors = read_safetensors(path / TENSORS)
    try:
        arrays = import_tensors(names_are_paths, tensors, shapes, dtype)
    except UserError as error:
        raise UserError(f"{path / TENSORS}: {error}") from error
    return Bundle(architecture, arrays, content["variant"], str(path), _read_tokenizer(path, architecture))


def write_folder(path: Path, bundle: Bundle) -> None:
    """Writes the model as a folder of our format; one that is there already is replaced, other files in it stay.

    Whatever happens on the way, the folder never holds the config of one model and the weights of another: it is as
    it was, or complete, or without a config and so nobody's.

    Raises:
        UserError: a folder that holds anything else, or that cannot be written.
    """
    _check_free(path)
    content = {
        "format": FORMAT,
        "variant": bundle.variant,
        "architecture": dataclasses.asdict(bundle.architecture),
    }
    with contextlib.ExitStack() as stack:
        config = stack.enter_context(whole(path / CONFIG))
        if bundle.tokenizer is not None:
            stack.enter_context(whole(path / TOKENIZER)).write_text(bundle.tokenizer, encoding="utf-8")
        tensors = stack.enter_context(whole(path / TENSORS))
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _save(tensors, bundle.arrays)
        (path / CONFIG).unlink(missing_ok=True)  # then the weights get their name, and last the config


def _read_tokenizer(path: Path, architecture: Architecture) -> str | None:
    """Returns what the folder's tokenizer.json says; None: the tokenizer is CLIP's own, or did not come along."""
    if architecture.tokenize.kind == "clip" or not (path / TOKENIZER).exists():
        return None
    return read_text(path / TOKENIZER)


def read_json(path: Path) -> Any:
    """Returns what a file of JSON says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


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


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes tensors as a safetensors file; the same tensors give the same bytes."""
    in_order = {name: np.asarray(x, order="C") for name, x in tensors.items()}  # the library takes this for granted
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.numpy.save_file(in_order, path)
        path.chmod(mode)  # the library leaves a file that nobody else may read
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error  # which says more to whoever writes files


def _read_config(path: Path) -> dict[str, Any]:
    """Returns a config.json that has all fields of our format, each of its type."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise UserError(f"{path}: format={reprlib.repr(found)} should be {FORMAT!r}: the folder is not of our format")
    for name, kind in (("variant", str), ("architecture", dict)):
        if not isinstance(content.get(name), kind):
            raise UserError(f"{path}: {name}={reprlib.repr(content.get(name))} should be {kind.__name__}")
    return content


def _check_free(path: Path) -> None:
    """Raises UserError when the folder holds anything but a model in our format, or what is left of one."""
    try:
        names = [entry.name for entry in path.iterdir()]
        names = [name for name in names if not any(is_temporary(name, ours) for ours in (CONFIG, TENSORS, TOKENIZER))]
        if not names or is_bundle(path) or _is_interrupted(path):
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    raise UserError(f"{path} holds something other than a model in this format; choose another folder")


def _is_interrupted(path: Path) -> bool:
    """Returns whether the folder has the weights of a model in our format, but not yet its config."""
    if os.path.lexists(path / CONFIG):
        return False
    try:
        return "text/token_embedding" in read_safetensors(path / TENSORS)
    except UserError:
        return False
