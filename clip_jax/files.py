"""Files are written whole or not at all: under a temporary name beside the target, then renamed over it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from clip_jax.errors import UserError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; it becomes `path` when the block ends well, and is gone if not.

    The folder is made when it is missing; the temporary name keeps the suffix, which some writers go by.

    Raises:
        UserError: the file cannot be written, with the system's reason.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
