"""Weights from wherever they are to wherever they should go: names, files, folders, runs.

`load` and `convert_weights.py` go through here; what the formats are is in `clip_jax/weights`.
"""

import dataclasses
import os
import reprlib
from pathlib import Path

import jax
import numpy as np
import rich.console

from clip_jax.errors import UserError, nearest
from clip_jax.models.clip import Definition
from clip_jax.weights import bundle, openai, parity
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.download import RELEASES, fetch
from clip_jax.weights.mapping import DType, flatten
from clip_jax.workdir import Workdir

WRITERS = {"openai": openai.write, "clip_jax": bundle.write_folder}


def read(
    source: str | os.PathLike, *, dtype: DType | None = None, download_root: str | os.PathLike | None = None
) -> Bundle:
    """Returns the architecture and the weights, on the host, of a released model's name, a file of OpenAI's, a folder
    in our format, or the workdir of a run (its latest checkpoint).

    Floats come in `dtype`, or where that is None in the dtype of the source.

    Raises:
        UserError: nothing of that name, or a damaged one.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"a model is a name or a path, not {reprlib.repr(source)} of type {type(source).__name__}")
    if source == "":
        raise UserError("the name of a model is empty; the folder one is in is '.'")
    if source in RELEASES:
        file = fetch(RELEASES[source], None if download_root is None else Path(download_root))
        return dataclasses.replace(openai.read(file, dtype), variant=str(source), origin=f"openai: {file}")
    path = _expanded(source)
    if os.path.isfile(path):  # noqa: PTH113 (Path's own fails for a name that is too long)
        return openai.read(path, dtype)
    if os.path.isdir(path):  # noqa: PTH112
        return _read_folder(path, dtype)
    raise UserError(
        f"{str(source)!r} is no file, no folder, and none of the models that can be downloaded: {', '.join(RELEASES)}"
    )


def convert(source: str, target_format: str, target: Path, *, check: bool = False) -> bool:
    """Writes the weights of `source` in another format; returns whether all that was checked is within its bar.

    What is checked is the written target, read again, against OpenAI's code with the weights of the source.

    Raises:
        UserError: a source that cannot be read, a format that is unknown or cannot hold it, a target that cannot be
            written, or a check without PyTorch.
    """
    if target_format not in WRITERS:
        raise UserError(f"unknown format {target_format!r}{nearest(target_format, WRITERS)}")
    target = _expanded(target)
    original = read(source)
    reference = parity.reference(original) if check else None
    WRITERS[target_format](target, original)
    console = rich.console.Console()
    console.print(f"{original.variant}: {original.origin} → {target}", soft_wrap=True, highlight=False, markup=False)
    if reference is None:
        return True
    rows = parity.compare(read(target, dtype=np.float32), reference)
    console.print(parity.table(rows, title=f"{original.variant}: {target} against OpenAI's code"))
    return all(row.holds for row in rows)


def _expanded(path: str | os.PathLike) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path's own fails for a user that there is not)


def _read_folder(path: Path, dtype: DType | None) -> Bundle:
    """Returns the model of a folder in our format or of a run's, as its config.json says."""
    file = path / bundle.CONFIG
    if not os.path.lexists(file):
        raise UserError(
            f"{path} is not a run's folder, nor a model's: it has no {bundle.CONFIG}; choose another folder"
        )
    content = bundle.read_json(file)
    if isinstance(content, dict) and "format" in content:
        return bundle.read_folder(path, dtype)
    if isinstance(content, dict) and "config" in content:
        return _read_run(Workdir(path))
    raise UserError(f"{file} should have 'format', as a model's folder, or 'config', as a run's; choose another folder")


def _read_run(workdir: Workdir) -> Bundle:
    """Returns what the latest checkpoint of a run holds."""
    from clip_jax.training.checkpoint import Checkpoints

    architecture = workdir.architecture()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), Definition(architecture).shapes()
    )
    with Checkpoints(workdir.checkpoints) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{workdir.path} has no checkpoint yet; train it first")
        weights = checkpoints.restore_weights(step, abstract)
    arrays = {path: np.asarray(x) for path, x in flatten(weights).items()}
    origin = f"{workdir.path}/checkpoints/{step}"
    results = workdir.evaluation(step)
    return Bundle(architecture, arrays, workdir.variant(), origin, workdir.tokenizer(), results)
