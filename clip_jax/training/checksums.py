"""Checksums of a checkpoint's files, for Orbax notices no flipped bit: it returns other numbers without a word."""

import concurrent.futures
import json
import os
import zlib

from clip_jax.files import AnyPath, blocks, sizes, write_text
from clip_jax.workdir import COMMITTED

FILE = "checksums.json"
OF_THE_COMMIT = ("_CHECKPOINT_METADATA", COMMITTED)  # when it was; Orbax writes them last of all
_BLOCK = 2**22  # bytes read at once


def write(folder: AnyPath) -> None:
    """Writes `checksums.json` into a folder: [size in bytes, CRC-32] of every file in it."""
    there = sorted(sizes(folder).items())
    files = [(name, size) for name, size in there if name.rpartition("/")[2] not in (FILE, *OF_THE_COMMIT)]
    with threads() as pool:
        found = pool.map(lambda file: _checksum(folder / file[0], file[1]), files)
        sums = {name: [size, crc] for (name, size), crc in zip(files, found, strict=True)}
    write_text(folder / FILE, json.dumps(sums, indent=0) + "\n")


def damage(folder: AnyPath, items: tuple[str, ...] | None = None, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Returns what is wrong with a folder's files by its `checksums.json`, in words; None: nothing.

    Of the folders `items` in it alone, when they are given; of share (i, n) every n-th file from the i-th on.
    """
    try:
        content = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return f"it has no {FILE}, without which nobody knows whether it is whole"
    except OSError as error:
        return f"{FILE} cannot be read: {error}"
    try:
        noted = [(name, (int(size), int(crc))) for name, (size, crc) in sorted(json.loads(content).items())]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{FILE} cannot be read: {error}"
    first, count = share
    mine = [(name, was) for name, was in noted if items is None or name.split("/")[0] in items][first::count]
    there = sizes(folder)
    with threads() as pool:
        found = pool.map(lambda entry: _difference(folder / entry[0], there.get(entry[0]), *entry[1]), mine)
        problems = [f"{name} {problem}" for (name, _), problem in zip(mine, found, strict=True) if problem]
    more = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
    return problems[0] + more if problems else None


def _difference(path: AnyPath, size: int | None, size_was: int, crc_was: int) -> str | None:
    if size is None:
        return "is missing"
    if size != size_was:
        return f"has {size:,} bytes, not {size_was:,}"
    try:
        return None if _checksum(path, size) == crc_was else "has other bytes than were written"
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"


def _checksum(path: AnyPath, size: int) -> int:
    crc = 0
    for block in blocks(path, size, _BLOCK):
        crc = zlib.crc32(block, crc)
    return crc


def threads() -> concurrent.futures.ThreadPoolExecutor:
    """Returns threads for files: reading and zlib's checksums leave the interpreter to others."""
    return concurrent.futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), thread_name_prefix="checksums")
