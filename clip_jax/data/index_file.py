"""Arrow files that stand for another file: made from it once, mapped into memory from then on, and known to be stale by
the other's size and time. They lie beside it, or in a cache folder where that cannot be written, or the other is a URL.
"""

import ctypes
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from clip_jax.data import storage
from clip_jax.data.storage import File
from clip_jax.errors import UserError
from clip_jax.files import whole

CACHE = "CLIP_JAX_INDEX_CACHE"  # the environment variable that names another folder
FOLDER = "~/.cache/clip_jax/index"
KEY, CHECK = b"clip_jax", b"clip_jax.crc32"  # of our words in the file's metadata, and of a number for them
NAME = 60  # characters that a name in the cache folder has of the other's; a digest comes before them


def places(of: File, tag: str) -> list[Path]:
    """Returns where the file that stands for another may lie, the better place first; `tag` says what is in it."""
    name = f"{storage.name_of(of.path)}.{tag}.index"
    if storage.is_url(of.path):
        return [_folder() / f"{_digest(of.path)[:16]}-{name[-NAME:]}"]
    path = Path(of.path).absolute()
    return [path.with_name(name), _folder() / f"{_digest(str(path))[:16]}-{name[-NAME:]}"]


def _folder() -> Path:
    try:
        return Path(os.environ.get(CACHE) or FOLDER).expanduser()
    except RuntimeError as error:
        raise UserError(f"there is no home folder to keep indexes in; name a folder in {CACHE}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def tag_of(*facts: Any) -> str:
    """Returns eight digits for facts that decide what is in such a file."""
    return _digest(json.dumps(facts))[:8]


def find(of: File, tag: str) -> tuple[Path, Any] | None:
    """Returns the file that stands for another in its present state, and what was noted in it."""
    for path in places(of, tag):
        if storage.is_url(of.path) and not path.exists():
            _fetch(of, tag, path)
        if (noted := noted_in(path, of)) is not None:
            return path, noted
    return None


def _fetch(of: File, tag: str, path: Path) -> None:
    """Puts what lies beside a URL, if anything, into the cache folder."""
    try:
        data = storage.read_if_there(f"{of.path}.{tag}.index")
    except OSError:  # some servers say so of what is not there; the index can be made
        return
    if data:
        try:
            with whole(path) as temporary:
                temporary.write_bytes(data)
        except UserError as error:
            raise _refused(error) from error


def noted_in(path: Path, of: File) -> Any | None:
    """Returns what was noted in a file; None: it is damaged, or stands for another file or an older state of it."""
    try:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_file(file).schema
        known = json.loads(schema.metadata[KEY])
        if schema.metadata[CHECK] != _check(schema):
            return None
        return known["noted"] if known["of"] == [of.size, of.stamp] else None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def _check(schema: pa.Schema) -> bytes:
    """Returns a number for what a schema says, and our words in it."""
    columns = ", ".join(map(str, schema))
    return b"%08x" % zlib.crc32(columns.encode() + schema.metadata[KEY])


def write(of: File, tag: str, schema: pa.Schema, tables: Callable[[], Iterable[pa.Table]], noted: Any) -> Path:
    """Returns the file, written whole in the first place that can be written; for each the tables are made anew.

    What is noted is not None; what goes wrong with the tables is no UserError, for that is what a place gives.

    Raises:
        UserError: there is none.
    """
    schema = schema.with_metadata({KEY: json.dumps({"of": [of.size, of.stamp], "noted": noted})})
    schema = schema.with_metadata(schema.metadata | {CHECK: _check(schema)})
    refused = None
    for path in places(of, tag):
        try:
            with whole(path) as temporary, pa.ipc.new_file(str(temporary), schema) as file:
                for table in tables():
                    file.write_table(table.replace_schema_metadata(schema.metadata))
        except UserError as error:
            refused = error
        else:
            if storage.is_url(of.path):  # for the other hosts, where we may write there
                storage.offer(f"{of.path}.{tag}.index", path.read_bytes())
            return path
    raise _refused(refused) from refused


def _refused(error: UserError) -> UserError:
    return UserError(f"{error}; or name a folder in {CACHE}")


def mapped(path: Path) -> pa.Table:
    """Returns the table in a file, mapped: what is read of it is shared by all processes.

    Raises:
        UserError: it is damaged.
    """
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        table.validate(full=True)  # else a damaged one ends the process, without a word
    except (OSError, pa.ArrowException, ValueError) as error:
        raise damaged(path) from error
    return table


def pages_of(table: pa.Table) -> tuple[int, int]:
    """Returns (address, size) of the memory that a mapped table lies in."""
    buffers = [buffer for column in table.columns for chunk in column.chunks for buffer in chunk.buffers() if buffer]
    first = min((buffer.address for buffer in buffers), default=0) // mmap.PAGESIZE * mmap.PAGESIZE
    return first, max((buffer.address + buffer.size for buffer in buffers), default=0) - first


def let_go(pages: tuple[int, int]) -> None:
    """Takes out of this process's memory what was read of a map; the system keeps it, and puts it back when needed."""
    _MADVISE(*pages, mmap.MADV_DONTNEED)


_MADVISE = ctypes.CDLL(None).madvise  # Python's own is a method of its maps, of which each keeps a file open
_MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def damaged(path: Path) -> UserError:
    """Returns what is to be said of such a file that is damaged."""
    return UserError(f"{path} is damaged; delete it, so that it is made anew")
