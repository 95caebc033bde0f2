"""Files are written whole or not at all: under a temporary name beside the target, then renamed over it; in a bucket,
where a file is whole as it is, from a temporary one here."""

import contextlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_jax.elsewhere import Elsewhere, elsewhere, is_elsewhere
from clip_jax.errors import UserError

AnyPath = Path | Elsewhere


def place(path: str | os.PathLike) -> AnyPath:
    """Returns a path of this machine's, or of a gs:// URL the one in its bucket.

    Raises:
        UserError: it is in other storage elsewhere, or the package for it is missing.
    """
    return elsewhere(path) if is_elsewhere(path) else Path(path)


@contextlib.contextmanager
def whole(path: AnyPath) -> Iterator[Path]:
    """Yields a temporary path in the same folder; it becomes `path` when the block ends well, and is gone if not.

    The folder is made when it is missing; the temporary name keeps the suffix, which some writers go by, and is
    different at every call. A process that is killed leaves its temporary behind: `is_temporary` knows it.

    Raises:
        UserError: the file cannot be written, with the system's reason.
    """
    if not path.name:
        raise UserError(f"cannot write '{path}': it names no file; give the file a name")
    if isinstance(path, Elsewhere):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            path.write_bytes((Path(folder) / path.name).read_bytes())
        return
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
def writable(path: AnyPath) -> Iterator[None]:
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


def read_text(path: AnyPath) -> str:
    """Returns what a text file says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8")  # line ends as they are
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def write_text(path: AnyPath, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: AnyPath) -> Any:
    """Returns what a file of JSON says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def children(folder: AnyPath) -> list[AnyPath]:
    """Returns what lies directly in a folder; nothing, where it is not there."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def sizes(folder: AnyPath) -> dict[str, int]:
    """Returns the files in a folder and in all folders of it, by their path in it, and their bytes."""
    if isinstance(folder, Elsewhere):
        return folder.sizes()
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def blocks(path: AnyPath, size: int, at_once: int) -> Iterator[bytes]:
    """Yields a file of so many bytes, so many at once; less, where it has less."""
    if isinstance(path, Elsewhere):
        yield from (path.part(start, min(start + at_once, size)) for start in range(0, size, at_once))
        return
    with path.open("rb") as file:
        while block := file.read(at_once):
            yield block
