"""Files by path or by URL: which there are, how large, and any part of them. URLs (`gs://`, `s3://`, `https://` …) are
read through fsspec, of which the package for the scheme must be installed; local files without it.
"""

import collections
import contextlib
import functools
import glob
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from clip_jax.errors import UserError

MAX_OPEN = 256  # files that a process keeps open; the usual limit is 1024 for all it has
AT_ONCE = 32  # questions to a server
RETRIES = (0.2, 1.0, 5.0)  # seconds before each further try
BLOCK = 8 << 20  # bytes, that a file elsewhere is read in when it is read from its beginning to its end
WINDOW = 1 << 14  # bytes, likewise of a local file
# What fsspec's systems call the time of the last change, or have instead; the first that is there counts.
STAMPS = ("mtime", "LastModified", "last_modified", "updated", "Last-Modified", "ETag", "etag", "modified", "created")


T = TypeVar("T")


class File(NamedTuple):
    """A file, and what tells whether it is still the same."""

    path: str
    size: int
    stamp: str  # the time of its last change, or what its server has instead


def is_url(path: str) -> bool:
    return "://" in path


def name_of(path: str) -> str:
    """Returns the last part of a path or URL."""
    return path.rstrip("/").rpartition("/")[2]


def expand(pattern: str, suffix: str) -> list[str]:
    """Returns the files that a pattern names: a file, a folder of files with the suffix, a glob, braces ({000..127}).

    What braces name is all there should be, found or not; what a folder or a glob names is what there is, sorted.

    Raises:
        UserError: nothing is there.
    """
    found = []
    for path in _braces(pattern):
        if is_url(path):
            found += _elsewhere(path, suffix)
        elif re.search(r"[*?\[]", path) and not os.path.exists(path):  # noqa: PTH110 (a URL is no Path; nor is this)
            there = sorted(glob.glob(os.path.expanduser(path), recursive=True))  # noqa: PTH207, PTH111
            found += [place for place in there if not os.path.isdir(place)]  # noqa: PTH112
        else:
            place = Path(path).expanduser()
            found += sorted(glob.glob(f"{glob.escape(str(place))}/*{suffix}")) if place.is_dir() else [str(place)]  # noqa: PTH207
    if twice := [path for path, times in collections.Counter(found).items() if times > 1]:
        raise UserError(f"{pattern!r} names {twice[0]} twice; name each file once")
    if not found:
        raise UserError(f"{pattern!r} names no file; write a file, a folder of *{suffix}, a glob, or {{000..127}}")
    return found


def _braces(pattern: str) -> Iterator[str]:
    """Yields what `{a,b}` and `{000..127}` stand for, each for every other; digits are filled up as the first has."""
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if inner is None:
        yield pattern
        return
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inner[1]):
        first, last = int(bounds[1]), int(bounds[2])
        if last < first:
            raise UserError(f"{inner[0]} in {pattern!r} counts down; write the smaller number first")
        words: Iterator[str] | list[str] = (f"{n:0{len(bounds[1])}}" for n in range(first, last + 1))
    else:
        words = inner[1].split(",")
    for word in words:
        yield from _braces(pattern[: inner.start()] + word + pattern[inner.end() :])


def _elsewhere(url: str, suffix: str) -> list[str]:
    system, path = system_of(url)
    try:
        with as_os_errors():
            if not re.search(r"[*?\[]", path):
                if url.endswith(suffix) or not system.isdir(path):
                    return [url]
                path = f"{path.rstrip('/')}/*{suffix}"
            return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    except OSError as error:
        raise explained(url, error) from error


@functools.lru_cache(maxsize=32)
def _system(scheme: str) -> Any:
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=True)  # for all files of a folder, one question


def system_of(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL, and the path in it.

    Raises:
        UserError: there is none for the scheme, or its package is not installed.
    """
    scheme = url.partition("://")[0]
    try:
        system = _system(scheme)
    except Exception as error:  # every package has its own
        raise UserError(f"{url} cannot be read: {' '.join(str(error).split())}") from error
    return system, system._strip_protocol(url)


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """Makes an OSError of whatever a server's client raises."""
    try:
        yield
    except (OSError, UserError, AssertionError):
        raise
    except Exception as error:  # every client has its own
        kind = PermissionError if getattr(error, "status", None) in (401, 403) else OSError
        raise kind(" ".join(str(error).split()) or type(error).__name__) from error


def explained(path: str, error: OSError) -> UserError:
    """Returns what is to be said of a file that cannot be read, or not be found."""
    return UserError(f"{path} cannot be read: {error.strerror or error}")


def look_up(paths: list[str]) -> list[File]:
    """Returns the files of these paths.

    Raises:
        UserError: some are not there; names them.
    """
    elsewhere = any(map(is_url, paths))
    with ThreadPoolExecutor(AT_ONCE) if elsewhere else contextlib.nullcontext() as pool:
        found = list((pool.map if pool else map)(_look_up, paths))
    missing = [path for path, file in zip(paths, found, strict=True) if file is None]
    if missing:
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise UserError(f"{len(missing)} of {len(paths)} files are not there: {shown}")
    return found


def is_there(path: str) -> bool:
    """Returns whether there is a file.

    Raises:
        UserError: storage does not say.
    """
    return _look_up(path) is not None


def _look_up(path: str) -> File | None:
    try:
        return patiently(lambda: _stat(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explained(path, error) from error


def _stat(path: str) -> File:
    if not is_url(path):
        status = os.stat(path)  # noqa: PTH116 (quicker, for a hundred thousand of them)
        return File(path, status.st_size, str(status.st_mtime_ns))
    system, inside = system_of(path)
    with as_os_errors():
        try:
            about = system.info(inside)
        except FileNotFoundError as error:
            # Of whatever goes wrong with a web server, fsspec says that the file is not there.
            if path.startswith("http") and getattr(error.__cause__, "status", None) not in (404, 410):
                raise error.__cause__ or error from None
            raise
    if about.get("size") is None:
        raise UserError(f"the server of {path} does not say how large it is, so that it cannot be read by index")
    return File(path, about["size"], next((str(about[key]) for key in STAMPS if about.get(key)), ""))


def patiently(call: Callable[[], T]) -> T:
    """Returns what the call returns, tried again after a while when storage does not answer.

    Raises:
        OSError: it does not in the end; at once, when the file is not there or may not be read.
    """
    for seconds in RETRIES:
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError:
            time.sleep(seconds)
    return call()


def read(path: str, start: int | None = None, size: int | None = None, *, stamp: str = "") -> bytes:
    """Returns a part of a file, or all of it; less, where it ends before. A local file that is read in parts is kept
    open; another `stamp` is another file in its place.

    Raises:
        OSError: it cannot be read.
    """
    if not is_url(path):
        return Path(path).read_bytes() if start is None else _OPEN.read(path, stamp, start, size)
    system, inside = system_of(path)
    with as_os_errors():
        data = system.cat_file(inside, start=start, end=None if size is None else (start or 0) + size)
    if size is not None and len(data) > size:
        raise OSError(f"the server of {path} sends more than the part it is asked for")
    return data


def read_if_there(path: str) -> bytes | None:
    """Returns a whole file; None: there is none."""
    try:
        return patiently(lambda: read(path))
    except FileNotFoundError:
        return None


def offer(url: str, data: bytes) -> bool:
    """Puts a file behind a URL, whole, where that is allowed; returns whether it is."""
    system, inside = system_of(url)
    if url.startswith("http"):  # a web server is not a place to put things
        return False
    try:
        system.pipe_file(inside, data)
    except Exception:  # read-only, in the words of whatever client
        return False
    return True


def opened(file: File) -> io.IOBase:
    """Returns a file opened for reading from its beginning to its end."""
    if not is_url(file.path):
        return Path(file.path).open("rb")
    system, inside = system_of(file.path)
    return system.open(inside, "rb", block_size=BLOCK, cache_type="readahead", size=file.size)


@contextlib.contextmanager
def reader(file: File) -> Iterator[Callable[[int, int], bytes]]:
    """Yields a function (start, size) → bytes for reading a file from its beginning to its end, skipping parts."""
    with as_os_errors():
        stream = opened(file)
    with stream:
        if is_url(file.path):

            def part(start: int, size: int) -> bytes:
                with as_os_errors():
                    stream.seek(start)
                    return stream.read(size)

            yield part
        else:
            yield _Window(stream.fileno()).read


class _Window:
    """A part of a file that is held, so that what lies close together is read at once."""

    def __init__(self, descriptor: int):
        self._descriptor, self._start, self._data = descriptor, 0, b""

    def read(self, start: int, size: int) -> bytes:
        at = start - self._start
        if at < 0 or at + size > len(self._data):
            self._start, self._data, at = start, os.pread(self._descriptor, max(size, WINDOW), start), 0
        return self._data[at : at + size]


class _Open:
    """Files that are kept open for reading: threads share them, and each process has its own."""

    def __init__(self):
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[tuple[str, str], _Descriptor] = collections.OrderedDict()

    def read(self, path: str, stamp: str, start: int, size: int) -> bytes:
        with self._lock:
            descriptor = self._files.pop((path, stamp), None)
        descriptor = descriptor or _Descriptor(path)  # which may take a while: nobody waits for it
        with self._lock:
            self._files[path, stamp] = descriptor
            if len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)  # closed once no thread reads it any more
        return os.pread(descriptor.number, size, start)


class _Descriptor:
    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


_OPEN = _Open()
