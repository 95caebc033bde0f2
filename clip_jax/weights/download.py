"""Released files, OpenAI's weights above all: fetched once into a cache folder, resumed when cut, and never used
unchecked.

FOLDER/ViT-B-32.pt                     the whole file; its sha256 is looked at before every use
FOLDER/.ViT-B-32.pt.40d365715913.part  what has come of it so far; the next call goes on from there
FOLDER/.ViT-B-32.pt.lock               held while one process or thread fetches it, and the others wait

The system lets go of a lock when its process ends, however it ends.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import requests
import rich.console
import rich.progress

from clip_jax.errors import UserError

CACHE = "CLIP_JAX_CACHE"  # the environment variable that names another folder
FOLDER = "~/.cache/clip"  # where OpenAI's own package keeps them: who has them need not fetch them again
TIMEOUT = (5, 30)  # seconds: for a connection, for the next bytes
ATTEMPTS = 4  # in a row of which none gets further than the first
BACKOFF = 1.0  # seconds before the second of them; doubles
CHUNK = 1 << 16  # bytes; as much is lost at most when a transfer is cut


@dataclasses.dataclass(frozen=True)
class Release:
    """A published file, and what it should hold."""

    url: str
    checksum: str | None = None  # its sha256; None: the address says it, …/<sha256>/<file>

    @property
    def sha256(self) -> str:
        return self.checksum or self.url.split("/")[-2]

    @property
    def file(self) -> str:
        return self.url.split("/")[-1]


RELEASES = {
    name: Release(f"https://openaipublic.azureedge.net/clip/models/{path}")
    for name, path in {
        "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
        "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
        "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
        "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
        "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
        "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
    }.items()
}

Show = Callable[[int, int | None], None]  # bytes so far, and of how many when that is known


def fetch(release: Release, folder: Path | None = None) -> Path:
    """Returns the path of the file, whose sha256 is right; it is fetched unless it is there already.

    The folder is the argument, else what CLIP_JAX_CACHE says, else `~/.cache/clip`, where OpenAI's own package keeps
    the same files. A right one needs no network and no right to write; a wrong one stays until the new one is whole.

    Raises:
        UserError: it cannot be fetched (says where to put it by hand), or the folder cannot be used.
    """
    path = _folder(folder) / release.file
    try:
        if _sha256(path) == release.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            _fetch(release, path)
    except OSError as error:
        raise UserError(
            f"cannot keep {path}: {error.strerror or error}; make room or get the right to write there, "
            f"or name another folder in {CACHE}"
        ) from error
    return path


def cache(name: str) -> Path:
    """Returns the folder of what is ours to keep: in the one that CLIP_JAX_CACHE names, else in ~/.cache/clip_jax.

    Raises:
        UserError: there is no home folder.
    """
    return _folder(Path(os.environ.get(CACHE) or "~/.cache/clip_jax") / name)


def _folder(folder: Path | None) -> Path:
    try:
        return (folder or Path(os.environ.get(CACHE) or FOLDER)).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"there is no home folder to keep files in; name another folder in {CACHE}") from error


def _sha256(path: Path) -> str | None:
    """Returns the checksum of a file, None if there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(f"{path} is being fetched by another process; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say(text: str) -> None:
    rich.console.Console(stderr=True).print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


class _Failed(Exception):
    """Why a file cannot be fetched; `_fetch` adds which, and what to do."""


class _Cut(_Failed):
    """Why a transfer ended before its end; the next may bring the rest."""


def _fetch(release: Release, path: Path) -> None:
    """Puts the right file in its place."""
    found = _sha256(path)
    if found == release.sha256:
        return  # who held the lock has fetched it
    task = f"cannot fetch {release.url}"
    if found is not None:
        _say(f"{path} is damaged or of another version: its sha256 is {found}; fetching it again")
        task = f"{path} is damaged or of another version, and cannot be fetched again from {release.url}"
    partial = path.with_name(f".{path.name}.{release.sha256[:12]}.part")
    try:
        _download(release, partial)
    except _Failed as error:
        raise UserError(
            f"{task}: {error}; to put it there by hand, save it as {path}; its sha256 must be {release.sha256}"
        ) from error
    partial.replace(path)


def _download(release: Release, partial: Path) -> None:
    """Completes the partial file; one that is wrong is deleted, and fetched once more if it was of several pieces."""
    if _sha256(partial) == release.sha256:
        return  # a process was killed just before it moved it
    for _ in range(2):
        pieced = _transfer(release, partial)
        found = _sha256(partial)
        if found == release.sha256:
            return
        partial.unlink()
        if not pieced:
            break
    raise _Failed(f"what comes has the sha256 {found}, not {release.sha256}")


def _transfer(release: Release, partial: Path) -> bool:
    """Receives until the end; returns whether the file is of several pieces."""
    furthest, failures = _size(partial), 0
    with _shown(release.file) as show:
        while True:
            try:
                return _receive(release.url, partial, show)
            except _Cut as error:
                reached = _size(partial)
                furthest, failures = max(furthest, reached), 1 if reached > furthest else failures + 1
                if failures == ATTEMPTS:
                    raise _Failed(str(error)) from error
            time.sleep(BACKOFF * 2 ** (failures - 1))


def _size(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0


@contextlib.contextmanager
def _shown(name: str) -> Iterator[Show]:
    """Yields what moves a bar on stderr; none is drawn where nobody would see it move."""
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda size, total: progress.update(task, completed=size, total=total)


def _receive(url: str, partial: Path, show: Show) -> bool:
    """Receives what is missing of the partial file, or all; returns whether it went on from what was there.

    Raises:
        _Cut: it ended too early, and another attempt may do better.
        _Failed: the server's answer is final.
    """
    size = _size(partial)
    try:
        with _ask(url, size) as response:
            start, total = _span(response, size, partial)
            size = start
            show(size, total)
            with partial.open("ab" if start else "wb") as file:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    size += len(chunk)
                    show(size, total)
    except requests.RequestException as error:
        raise _Cut(reason_of(error)) from error
    if total is not None and size < total:  # a server may send less than it was asked for
        raise _Cut(f"the transfer ended after {size} of {total} bytes")
    return start > 0


def _ask(url: str, size: int) -> requests.Response:
    """Returns the server's answer, without its content yet, when it is asked for what comes after `size` bytes."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})
    try:
        return requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise _Cut(reason_of(error)) from error
    except OSError as error:  # its certificates, above all; not to be taken for the cache folder's
        raise _Failed(str(error)) from error


def _span(response: requests.Response, size: int, partial: Path) -> tuple[int, int | None]:
    """Returns (the place where the answer's content begins, the size of the whole file if it is said)."""
    status = f"the server answers {response.status_code} {response.reason or ''}".rstrip()
    if response.status_code == 200:  # all of it, asked for or not
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found and int(found[1]) == size:
            return size, None if found[2] == "*" else int(found[2])
        status += " with another part than was asked for"
    if size and response.status_code in (206, 416):  # nothing that can be gone on from
        partial.unlink()
        raise _Cut(status)
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise _Cut(status)
    raise _Failed(status)


def reason_of(error: BaseException) -> str:
    """Returns what lies at the bottom of a network's error, whose own text is a paragraph with addresses in it."""
    causes = (*error.args, getattr(error, "reason", None), error.__cause__)
    inner = next((cause for cause in causes if isinstance(cause, Exception)), None)
    if inner is not None:
        return reason_of(inner)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
