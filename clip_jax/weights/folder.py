"""A model's folder: a config and other small files, and one of tensors; written whole, or not at all.

The config is what makes a folder a model's. It goes first and comes last: whatever happens on the way, a folder never
has the config of one model and the weights of another. It is as it was, or complete, or has no config and is nobody's.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clip_jax.errors import UserError
from clip_jax.files import is_temporary, whole
from clip_jax.weights.mapping import listed
from clip_jax.weights.tensors import write_safetensors


def write(
    path: Path,
    files: Mapping[str, str | bytes | None],
    tensors_name: str,
    tensors: Mapping[str, np.ndarray],
    *,
    replaces: bool = False,
) -> None:
    """Writes a folder of these files, of which the first is the config, and a safetensors file.

    None is a file that this model does not have; one that is there goes. A folder that holds files of
    these names alone is replaced. With `replaces` the caller knows it for a model's, and what else is in it stays.

    Raises:
        UserError: a folder that holds anything else, or that cannot be written.
    """
    ours = [*files, tensors_name]
    others = [] if replaces else [name for name in contents(path, ours) if name not in ours]
    if others:
        raise UserError(f"{path} holds something other than such a model: {listed(others)}; choose another folder")
    config = path / next(iter(files))
    with contextlib.ExitStack() as stack:  # files get their names in the reverse order, the config the last
        for name, content in files.items():
            if content is not None:
                content = content if isinstance(content, bytes) else content.encode()
                stack.enter_context(whole(path / name)).write_bytes(content)
        write_safetensors(stack.enter_context(whole(path / tensors_name)), tensors)
        config.unlink(missing_ok=True)
        for name in (name for name, content in files.items() if content is None):
            (path / name).unlink(missing_ok=True)


def contents(path: Path, names: Sequence[str]) -> list[str]:
    """Returns what is in a folder, sorted, without what an interrupted writing of files of these names has left.

    Raises:
        UserError: it is no folder, or cannot be looked into.
    """
    try:
        found = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    return [name for name in found if not any(is_temporary(name, ours) for ours in names)]
