"""Paths in a bucket, `gs://BUCKET/FOLDER`, with as much of `pathlib.Path` as a run needs of its workdir.

A file there is written whole or not at all, and nothing can be appended to it or renamed. Reading what is not there is
a FileNotFoundError, as it is on a disk; whatever else goes wrong is the user's to mend, and said in one line.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from clip_jax.data import storage
from clip_jax.errors import UserError

_SCHEME = "gs"

# The client's tracebacks, of errors that it raises, too, and we tell.
logging.getLogger("gcsfs").addFilter(lambda record: not record.exc_info)


class Elsewhere(PurePosixPath):
    """A file, or what lies behind a prefix, in a bucket.

    Raises, by all its methods:
        UserError: the storage refuses, or cannot be reached.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def absolute(self) -> "Elsewhere":
        return self

    def resolve(self) -> "Elsewhere":
        return self

    def exists(self) -> bool:
        try:
            with self._reached("read"):
                _system().info(str(self))
        except FileNotFoundError:
            return False
        return True

    def iterdir(self) -> Iterator["Elsewhere"]:
        """Yields what lies directly in the folder; nothing of one that is not there."""
        try:
            with self._reached("read"):
                found = _system().ls(str(self), detail=False)
        except FileNotFoundError:
            return
        yield from (self / storage.name_of(path) for path in found)

    def sizes(self) -> dict[str, int]:
        """Returns the files in the folder and in all folders of it, by their path in it, and their bytes."""
        with self._reached("read"):
            found = _system().find(str(self), detail=True)
        start = len(str(self).removeprefix(f"{_SCHEME}://")) + 1
        return {path[start:]: about["size"] for path, about in found.items() if about["size"] or path[-1] != "/"}

    def read_bytes(self) -> bytes:
        with self._reached("read"):
            return _system().cat_file(str(self))

    def part(self, start: int, end: int) -> bytes:
        """Returns the bytes from one place to another; the file has as many."""
        with self._reached("read"):
            return _system().cat_file(str(self), start=start, end=end)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        try:
            with self._reached("written"):
                _system().pipe_file(str(self), data)
        except FileNotFoundError as error:
            raise UserError(f"{self} cannot be written: there is no bucket {self.parts[1]!r}; make it first") from error

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def take(self, folder: Path) -> None:
        """Copies a folder of this machine's to here."""
        with self._reached("written"):
            _system().put(f"{folder}/", f"{self}/", recursive=True)

    def rename(self, target: "Elsewhere") -> None:
        """Moves a folder, file by file."""
        with self._reached("moved"):
            _system().mv(str(self), str(target), recursive=True)

    @contextlib.contextmanager
    def _reached(self, done: str) -> Iterator[None]:
        """Says what became of the storage in its block, where that is not that something is not there."""
        try:
            with storage.as_os_errors():
                yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from error
        except OSError as error:
            raise UserError(
                f"{self} cannot be {done}: {' '.join(str(error).split()) or type(error).__name__}; look at the "
                "bucket's name, at this machine's network, and at what its credentials may do there"
            ) from error


def is_elsewhere(path: str | os.PathLike) -> bool:
    """Returns whether a path is none of this machine's."""
    # pathlib makes one slash of two.
    return storage.is_url(os.fspath(path)) or os.fspath(path).startswith(f"{_SCHEME}:/")


def elsewhere(url: str | os.PathLike) -> Elsewhere:
    """Returns the path of a URL.

    Raises:
        UserError: it is none of a bucket's, or has no plain name, or the package for it is missing.
    """
    url = os.fspath(url)
    if not re.match(rf"{_SCHEME}://?[^/]+", url):
        raise UserError(f"{url!r} cannot hold a run: of storage elsewhere that is {_SCHEME}://BUCKET/FOLDER alone")
    if wrong := re.search(r"[*?\[\]#]", url):
        raise UserError(f"{url!r} has a {wrong[0]!r} in it, which clients take for a pattern; choose another name")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f'{url} is read and written by gcsfs, which is missing: pip install "clip-nnx[cloud]"')
    os.environ.setdefault("EPATH_USE_TF", "false")  # or Orbax would read and write by TensorFlow, where there is one
    return Elsewhere(url)


@functools.cache
def _system() -> Any:
    """Returns what speaks with the storage; it remembers no folder's content: TensorStore writes past it."""
    import fsspec

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)  # Orbax' own, too
    return fsspec.filesystem("gcs")
