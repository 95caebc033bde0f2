"""Checksums of a checkpoint's files, for Orbax notices no flipped bit: it returns other numbers without a word."""

import concurrent.futures
import json
import os
import zlib
from pathlib import Path

from clip_jax.files import write_text

FILE = "checksums.json"
OF_THE_COMMIT = ("_CHECKPOINT_METADATA", "commit_success.txt")  # when it was; Orbax writes them last of all
_BLOCK = 2**22  # bytes read at once


def write(folder: Path) -> None:
    """Writes `checksums.json` into a folder: [size in bytes, CRC-32] of every file in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (FILE, *OF_THE_COMMIT))
    with _threads() as pool:
        sums = dict(zip((str(path.relative_to(folder)) for path in files), pool.map(_checksum, files), strict=True))
    write_text(folder / FILE, json.dumps(sums, indent=0) + "\n")


def damage(folder: Path, items: tuple[str, ...] | None = None, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Returns what is wrong with a folder's files by its `checksums.json`, in words; None: nothing.

    Of the folders `items` in it alone, when they are given; of share (i, n) every n-th file from the i-th on.
    """
    try:
        sums = json.loads((folder / FILE).read_bytes())
        noted = [(name, (int(size), int(crc))) for name, (size, crc) in sorted(sums.items())]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{FILE} cannot be read: {error}"
    first, count = share
    mine = [(name, was) for name, was in noted if items is None or name.split("/")[0] in items][first::count]
    with _threads() as pool:
        found = pool.map(lambda entry: _difference(folder / entry[0], entry[1]), mine)
        problems = [f"{name} {problem}" for (name, _), problem in zip(mine, found, strict=True) if problem]
    more = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
    return problems[0] + more if problems else None


def _difference(path: Path, was: tuple[int, int]) -> str | None:
    try:
        if (size := path.stat().st_size) != was[0]:
            return f"has {size:,} bytes, not {was[0]:,}"
        return None if _checksum(path) == was else "has other bytes than were written"
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"


def _checksum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Returns threads for files: reading and zlib's checksums leave the interpreter to others."""
    return concurrent.futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), thread_name_prefix="checksums")
