"""Files are written whole or not at all: under a temporary name beside the target, then renamed over it."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; it becomes `path` when the block ends well, and is gone if not.

    The folder is made when it is missing; the temporary name keeps the suffix, which some writers go by, and is
    different at every call. A process that is killed leaves its temporary behind: `is_temporary` knows it.

    Raises:
        UserError: the file cannot be written, with the system's reason.
    """
    if not path.name:
        raise UserError(f"cannot write '{path}': it names no file; give the file a name")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}{path.suffix}")
    try:
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Raises UserError, with the system's reason, when its block cannot write to the path."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another place, or make room"
        ) from error


def is_temporary(name: str, target: str) -> bool:
    """Returns whether a file of this name is one that `whole` began for the target, and perhaps never finished."""
    stem, suffix = re.escape(Path(target).stem), re.escape(Path(target).suffix)
    return re.fullmatch(rf"\.{stem}\.\d+(\.[0-9a-f]{{8}})?{suffix}", name) is not None


def read_text(path: Path) -> str:
    """Returns what a text file says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8")  # line ends as they are
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Returns what a file of JSON says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
