"""An architecture with its weights on the host, and our own format for the two: a folder that needs no table.

FOLDER/config.json         {"format": "clip_jax", "variant": …, "architecture": …}
FOLDER/model.safetensors   parameters and statistics by our paths, in the dtypes they came in
FOLDER/tokenizer.json      where the model has a tokenizer of its own

A run's folder has a `config.json` too (clip_jax/workdir.py), with "config" and no "format": `is_bundle` tells them
apart by what is in them.
"""

import dataclasses
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.architecture import Architecture, Preprocess, Tokenize
from clip_jax.checked import build, leaves
from clip_jax.errors import UserError, about, all_of
from clip_jax.files import AnyPath, read_json, read_text
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.tokenizer.file import FILE_NAME
from clip_jax.weights import folder
from clip_jax.weights.mapping import DType, Rule, flatten, import_tensors
from clip_jax.weights.streaming import specs_of
from clip_jax.weights.tensors import read_safetensors

FORMAT = "clip_jax"
CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", FILE_NAME
FINGERPRINTED = 2**16  # bytes; larger arrays are not read for a fingerprint
RESIZE_KERNELS = ("bicubic_antialias", "bicubic")  # OpenCLIP's and timm's, Hugging Face's: weights/resize.py


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An architecture and its weights: NumPy arrays by our paths, in the dtypes of their source.

    What is read from a file is read when an array is asked for, each time anew.
    """

    architecture: Architecture
    arrays: Mapping[str, np.ndarray]
    variant: str  # the architecture's name
    origin: str  # where the weights come from
    tokenizer: str | None = None  # what its tokenizer.json says, where `architecture.tokenize.kind` is "file"
    results: AnyPath | None = None  # where their evaluations go unless told otherwise; None: they are no run's
    resize_kernel: str = RESIZE_KERNELS[0]  # by which their family resizes an image's positions: weights/resize.py

    def fingerprint(self) -> str:
        """Returns what tells these weights from others, by architecture, shapes and all small arrays: the large
        ones are not read for it."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.architecture), sort_keys=True).encode())
        for path, like in specs_of(self.arrays).items():
            digest.update(f"{path} {np.dtype(like.dtype)} {like.shape}".encode())
            if math.prod(like.shape) * like.dtype.itemsize <= FINGERPRINTED:
                digest.update(np.ascontiguousarray(self.arrays[path]).tobytes())
        return digest.hexdigest()


def variant_of(architecture: Architecture, otherwise: str) -> str:
    """Returns the name that the towers have in the table of variants, or `otherwise` when they are not there.

    How images and texts are prepared comes with the weights, and has no name.
    """

    def towers(named: Architecture) -> Architecture:
        return dataclasses.replace(named, preprocess=Preprocess(), tokenize=Tokenize())

    return next((name for name, known in VARIANTS.items() if towers(known) == towers(architecture)), otherwise)


def differences(wanted: Architecture, found: Architecture, besides: tuple[str, ...] = ()) -> list[str]:
    """Returns "image.width is 512, not 768" for every field that is not what was wanted, but for those whose path
    begins with a word of `besides`."""
    expected, there = ({path: value for path, _, value in leaves(arch)} for arch in (wanted, found))
    return [
        f"{path} is {there.get(path)!r}, not {expected.get(path)!r}"
        for path in sorted(expected.keys() | there.keys())
        if expected.get(path) != there.get(path) and not path.startswith(besides)
    ]


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
    with about(f"{path / CONFIG}: architecture"):
        architecture = build(Architecture, content["architecture"])
    shapes = flatten(Definition(architecture).shapes())
    names_are_paths = [Rule(name, name, "... -> ...") for name in shapes]

    def arrays() -> Mapping[str, np.ndarray]:
        tensors = read_safetensors(path / TENSORS)
        with about(path / TENSORS):
            return import_tensors(names_are_paths, tensors, shapes, dtype)

    found, tokenizer = all_of(arrays, lambda: _read_tokenizer(path / TOKENIZER, architecture))
    kernel = content.get("resize_kernel", RESIZE_KERNELS[0])  # older folders have none
    return Bundle(architecture, found, content["variant"], str(path), tokenizer, resize_kernel=kernel)


def write_folder(path: Path, bundle: Bundle) -> None:
    """Writes the model as a folder of our format; one that is there already is replaced, other files in it stay.

    Whatever happens on the way, the folder never holds the config of one model and the weights of another: it is as
    it was, or complete, or without a config and so nobody's.

    Raises:
        UserError: a folder that holds anything else, or that cannot be written; a model that lacks its tokenizer.
    """
    if bundle.architecture.tokenize.kind == "file" and bundle.tokenizer is None:
        raise UserError(f"{bundle.variant} of {bundle.origin} has no tokenizer; its folder should have a {TOKENIZER}")
    _check_free(path)
    content = {
        "format": FORMAT,
        "variant": bundle.variant,
        "architecture": dataclasses.asdict(bundle.architecture),
        "resize_kernel": bundle.resize_kernel,
    }
    texts = {CONFIG: json.dumps(content, indent=2) + "\n", TOKENIZER: bundle.tokenizer}
    folder.write(path, texts, TENSORS, bundle.arrays, replaces=True)


def _read_config(path: Path) -> dict[str, Any]:
    """Returns a config.json that has all fields of our format, each of its type."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise UserError(f"{path}: format={reprlib.repr(found)} should be {FORMAT!r}: the folder is not of our format")
    for name, kind in (("variant", str), ("architecture", dict)):
        if not isinstance(content.get(name), kind):
            raise UserError(f"{path}: {name}={reprlib.repr(content.get(name))} should be {kind.__name__}")
    check_resize_kernel(path, content.get("resize_kernel", RESIZE_KERNELS[0]))
    return content


def check_resize_kernel(path: AnyPath, found: Any) -> str:
    """Returns the name of a kernel, which a config.json has.

    Raises:
        UserError: there is no such kernel.
    """
    if found not in RESIZE_KERNELS:
        raise UserError(f"{path}: resize_kernel={reprlib.repr(found)} is not one of {', '.join(RESIZE_KERNELS)}")
    return found


def _read_tokenizer(path: Path, architecture: Architecture) -> str | None:
    """Returns what the folder's tokenizer.json says, None where the tokenizer is CLIP's own."""
    if architecture.tokenize.kind == "clip":
        return None
    try:
        return read_text(path)
    except UserError as error:
        raise UserError(f"{error}; a model's tokenizer lies beside its weights") from error


def _check_free(path: Path) -> None:
    """Raises UserError when the folder holds anything but a model in our format, or what is left of one."""
    if folder.contents(path, (CONFIG, TENSORS, TOKENIZER)) and not is_bundle(path) and not _is_interrupted(path):
        raise UserError(f"{path} holds something other than a model in this format; choose another folder")


def _is_interrupted(path: Path) -> bool:
    """Returns whether the folder has the weights of a model in our format, but not yet its config."""
    if os.path.lexists(path / CONFIG):
        return False
    try:
        return "text/token_embedding" in read_safetensors(path / TENSORS)
    except UserError:
        return False
