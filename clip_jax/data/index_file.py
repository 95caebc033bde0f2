"""Arrow files that stand for another file: made from it once, mapped into memory from then on, and known to be stale by
the other's size and time. They lie beside it, or in a cache folder where that cannot be written, or the other is a URL.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from clip_jax.data import storage
from clip_jax.data.storage import File
from clip_jax.errors import UserError
from clip_jax.files import whole

CACHE = "CLIP_JAX_INDEX_CACHE"  # the environment variable that names another folder
FOLDER = "~/.cache/clip_jax/index"
KEY = b"clip_jax"  # of our words in the file's metadata


def places(of: File, tag: str) -> list[Path]:
    """Returns where the file that stands for another may lie, the better place first; `tag` says what is in it."""
    name = f"{storage.name_of(of.path)}.{tag}.index"
    if storage.is_url(of.path):
        return [_folder() / f"{_digest(of.path)[:16]}-{name}"]
    path = Path(of.path).absolute()
    return [path.with_name(name), _folder() / f"{_digest(str(path))[:16]}-{name}"]


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
        if not path.exists() and storage.is_url(of.path):
            _fetch(of, tag, path)
        if path.exists() and (noted := noted_in(path, of)) is not None:
            return path, noted
    return None


def _fetch(of: File, tag: str, path: Path) -> None:
    """Puts what lies beside a URL, if anything, into the cache folder."""
    if data := storage.read_if_there(f"{of.path}.{tag}.index"):
        with whole(path) as temporary:
            temporary.write_bytes(data)


def noted_in(path: Path, of: File) -> Any | None:
    """Returns what was noted in a file; None: it is damaged, or stands for another file or an older state of it."""
    try:
        with pa.memory_map(str(path)) as file:
            known = json.loads(pa.ipc.open_file(file).schema.metadata[KEY])
        return known["noted"] if known["of"] == [of.size, of.stamp] else None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def write(of: File, tag: str, schema: pa.Schema, tables: Iterable[pa.Table], noted: Any) -> Path:
    """Returns the file, written whole in the first place that can be written.

    Raises:
        UserError: there is none.
    """
    schema = schema.with_metadata({KEY: json.dumps({"of": [of.size, of.stamp], "noted": noted})})
    refused = None
    for path in places(of, tag):
        try:
            with whole(path) as temporary, pa.ipc.new_file(str(temporary), schema) as file:
                for table in tables:
                    file.write_table(table.replace_schema_metadata(schema.metadata))
        except UserError as error:
            refused = error
        else:
            if storage.is_url(of.path):  # for the other hosts, where we may write there
                storage.offer(f"{of.path}.{tag}.index", path.read_bytes())
            return path
    raise UserError(f"{refused}; or name a folder in {CACHE}") from refused


def mapped(path: Path) -> pa.Table:
    """Returns the table in a file, mapped: what is read of it is shared by all processes."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()
