"""`folder:` — images in one sub-folder a class; `csv:` — a table of paths and captions (csv, tsv or parquet)."""

import contextlib
import functools
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv as pa_csv
from pyarrow import parquet as pq
from pyarrow import types

from clip_jax.data import captions, index_file, storage
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources.source import Inventory, Keys, Record
from clip_jax.data.storage import File
from clip_jax.errors import UserError

IMAGES = "filepath;image;image_path;path;file;file_name"  # columns
CAPTIONS = "title;caption;captions;text"


class ImageFolder:
    """Images in one sub-folder a class; the caption is what a .txt file of the same name says, else the class."""

    def __init__(self, folder: str, keys: Keys):
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"there is no folder {folder!r}; write folder:DIR, with one sub-folder of images a class")
        suffixes = {f".{key.lower()}" for key in keys.images_or("jpg;jpeg;png;webp")}
        self.classnames = tuple(
            sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        )
        self._root, self._caption_suffixes = root, [f".{key}" for key in keys.captions_or("txt")]
        self._files = [
            (label, file.relative_to(root).as_posix(), size)
            for label, name in enumerate(self.classnames)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in suffixes and (size := _size(file)) is not None
        ]
        if not self._files:
            raise UserError(
                f"no sub-folder of {folder!r} has an image ({', '.join(sorted(suffixes))}); there must be one "
                "sub-folder a class"
            )
        self.name, self.split = root.resolve().name, "all"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        label, file, _ = self._files[index]
        path = self._root / file
        beside = (storage.read_if_there(str(path.with_suffix(suffix))) for suffix in self._caption_suffixes)
        texts = [text for text in beside if text is not None] or [self.classnames[label].replace("_", " ")]
        try:
            return Record(storage.read(str(path)), captions.of(texts), label, file)
        except FileNotFoundError as error:
            raise BadRecord(Problem.NO_IMAGE) from error

    def shard_of(self, index: int) -> str:
        return self.classnames[self._files[index][0]]

    def fingerprint(self) -> dict[str, Any]:
        files = _digest((file, size) for _, file, size in self._files)
        return {"source": "folder", "records": len(self), "files": files}

    def inventory(self) -> Inventory:
        return Inventory(shards=len(self.classnames), image_bytes=sum(size for _, _, size in self._files))


def _size(file: Path) -> int | None:
    """Returns the bytes of a file, none for a link that leads nowhere; None: it is a folder."""
    try:
        status = file.stat()
    except FileNotFoundError:  # a record that cannot be read, and no reason to stop
        return 0
    return None if stat.S_ISDIR(status.st_mode) else status.st_size


def _digest(facts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(fact).encode())
    return digest.hexdigest()


class Table:
    """Rows of a path and captions. Paths are relative to the table's folder, or absolute, or URLs.

    What is read of the table is kept as an Arrow file: ten million rows are mapped, not held by every process.
    """

    def __init__(self, path: str, keys: Keys):
        [self._of] = storage.look_up([path if storage.is_url(path) else os.path.expanduser(path)])  # noqa: PTH111
        columns = _columns(self._of, keys)
        tag = index_file.tag_of(columns)
        found = index_file.find(self._of, tag)
        self._path = found[0] if found else _keep(self._of, tag, columns)
        self.name, self.split, self.classnames = storage.name_of(path).partition(".")[0], "all", ()
        self._length = len(_opened(self._path, self._of))
        if not len(self):
            raise UserError(f"{path} has no row")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        image, *texts = _opened(self._path, self._of).columns
        name = image[index].as_py() or ""
        name = name if isinstance(name, str) else os.fsdecode(name)
        if not name or "\0" in name:
            raise BadRecord(Problem.NO_IMAGE)
        found = captions.of(text for column in texts for text in captions.within(column[index].as_py(), ()))
        try:
            return Record(storage.read(self._absolute(name)), found, None, name)
        except FileNotFoundError as error:
            raise BadRecord(Problem.NO_IMAGE) from error
        except UserError as error:  # a scheme that nobody knows
            raise BadRecord(Problem.UNREADABLE) from error

    def _absolute(self, name: str) -> str:
        folder = self._of.path.rpartition("/")[0]
        return name if storage.is_url(name) or name.startswith("/") or not folder else f"{folder}/{name}"

    def shard_of(self, index: int) -> str:
        return f"{storage.name_of(self._of.path)}, rows {index // 10_000 * 10_000:,} …"

    def fingerprint(self) -> dict[str, Any]:
        return {"source": "csv", "records": len(self), "size": self._of.size}

    def inventory(self) -> Inventory:
        return Inventory(shards=1)


@functools.lru_cache(8)
def _opened(path: Path, of: File) -> pa.Table:
    """Returns the Arrow file for one state of a table."""
    return index_file.mapped(path)


def _columns(of: File, keys: Keys) -> list[str]:
    """Returns the names of the column with paths and of those with captions."""
    with _explained(of), storage.opened(of) as file:
        if of.path.endswith(".parquet"):
            kinds = {field.name: field.type for field in pq.ParquetFile(file).schema_arrow}
        else:
            kinds = dict.fromkeys(pa_csv.open_csv(file, parse_options=_parsing(of)).schema.names, pa.binary())
    image = next((name for name in keys.images_or(IMAGES) if _is_text(kinds.get(name))), None)
    texts = [name for name in keys.captions_or(CAPTIONS) if _is_text(_of_one(kinds.get(name)))]
    texts = texts if keys.captions else texts[:1]
    if image is None or not texts:
        lacks, field = ("paths of images", "image_keys") if image is None else ("captions", "caption_keys")
        found = ", ".join(name if _is_text(_of_one(kind)) else f"{name} ({kind})" for name, kind in kinds.items())
        raise UserError(
            f"{of.path} has no column of {lacks} by a usual name; it has {found}; say which in data.{field}"
        )
    return [image, *texts]


def _is_text(kind: pa.DataType | None) -> bool:
    kind = _plain(kind)
    return kind is not None and any(
        test(kind) for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def _of_one(kind: pa.DataType | None) -> pa.DataType | None:
    """Returns the kind of what a list has, and that of anything else."""
    return kind.value_type if kind is not None and (types.is_list(kind) or types.is_large_list(kind)) else kind


def _plain(kind: pa.DataType | None) -> pa.DataType | None:
    """Returns the kind without a dictionary, of which an Arrow file can have but one a column."""
    return kind.value_type if kind is not None and types.is_dictionary(kind) else kind


def _parsing(of: File) -> pa_csv.ParseOptions:
    return pa_csv.ParseOptions(delimiter="\t" if of.path.endswith(".tsv") else ",", newlines_in_values=True)


def _keep(of: File, tag: str, columns: list[str]) -> Path:
    """Returns the Arrow file of some columns of a table."""
    with _explained(of), storage.opened(of) as file:
        schema, _ = _batches(of, file, columns)
    try:
        return index_file.write(of, tag, schema, lambda: _tables(of, columns), {})
    except pa.ArrowException as error:
        raise UserError(str(error)) from error


def _tables(of: File, columns: list[str]) -> Iterator[pa.Table]:
    try:
        with _explained(of), storage.opened(of) as file:
            schema, batches = _batches(of, file, columns)
            for batch in batches:
                yield pa.Table.from_batches([batch]).select(columns).cast(schema)
    except UserError as error:  # not for want of a place to write to
        raise pa.ArrowInvalid(str(error)) from error


def _batches(of: File, file: io.IOBase, columns: list[str]) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    if of.path.endswith(".parquet"):
        table = pq.ParquetFile(file)
        kinds = [(name, _plain(table.schema_arrow.field(name).type)) for name in columns]
        return pa.schema(kinds), table.iter_batches(columns=columns)
    # Captions as bytes: whether they are text is each record's own affair.
    kinds = dict.fromkeys(columns, pa.binary())
    converting = pa_csv.ConvertOptions(include_columns=columns, column_types=kinds, check_utf8=False)
    batches = pa_csv.open_csv(file, parse_options=_parsing(of), convert_options=converting)
    return batches.schema, batches


@contextlib.contextmanager
def _explained(of: File) -> Iterator[None]:
    try:
        with storage.as_os_errors():
            yield
    except OSError as error:
        raise UserError(f"{of.path} cannot be read as a table: {' '.join(str(error).split())}") from error
