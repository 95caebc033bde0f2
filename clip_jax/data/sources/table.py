"""`csv:` — a table of paths and captions: .csv, .tsv or .parquet."""

import contextlib
import functools
import io
import os
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
BLOCK = 1 << 26  # bytes of a csv that are parsed at once; a row is not longer


class Table:
    """Rows of a path and captions. Paths are relative to the table's folder, or absolute, or URLs.

    What is read of the table is kept as an Arrow file: ten million rows are mapped, not held by every process.
    """

    def __init__(self, path: str, keys: Keys):
        [self._of] = storage.look_up([path if storage.is_url(path) else os.path.expanduser(path)])  # noqa: PTH111
        columns = _columns(self._of, keys)
        tag = index_file.tag_of(columns)
        self._path, noted = index_file.find(self._of, tag) or _keep(self._of, tag, columns)
        self._left_out = noted["left_out"]
        self.name, self.split = storage.name_of(path).partition(".")[0], "all"
        self.classnames, self.templates = (), ()
        self._length = len(self._rows())
        if not len(self):
            raise UserError(f"{path} has no row")

    def __len__(self) -> int:
        return self._length

    def _rows(self) -> pa.Table:
        """Returns the Arrow file's rows.

        Raises:
            BadRecord: it is that of another state of the table by now.
        """
        if (rows := _opened(self._path, self._of)) is None:
            raise BadRecord(Problem.CHANGED)
        return rows

    def __getitem__(self, index: int) -> Record:
        image, *texts = self._rows().columns
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
        return Inventory(shards=1, left_out=self._left_out)


@functools.lru_cache(8)
def _opened(path: Path, of: File) -> pa.Table | None:
    return None if index_file.noted_in(path, of) is None else index_file.mapped(path)


def _columns(of: File, keys: Keys) -> list[str]:
    """Returns the names of the column with paths and of those with captions."""
    with _explained(of), storage.opened(of) as file:
        if of.path.endswith(".parquet"):
            kinds = {field.name: field.type for field in pq.ParquetFile(file).schema_arrow}
        else:
            kinds = dict.fromkeys(_open_csv(of, file, []).schema.names, pa.binary())
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


def _open_csv(of: File, file: io.IOBase, odd: list[int], columns: list[str] | None = None) -> pa_csv.CSVStreamingReader:
    """Returns the rows of a csv or tsv; of those with more or fewer fields than it has names, the number goes to `odd`.

    In a csv, quotes are what RFC 4180 says; in a tsv they are characters like any other.
    """

    def skip(row: pa_csv.InvalidRow) -> str:
        odd.append(row.actual_columns)
        return "skip"

    quoting = {"delimiter": "\t", "quote_char": False} if of.path.endswith(".tsv") else {"newlines_in_values": True}
    converting = None
    if columns:  # captions as bytes: whether they are text is each record's own affair
        kinds = dict.fromkeys(columns, pa.binary())
        converting = pa_csv.ConvertOptions(include_columns=columns, column_types=kinds, check_utf8=False)
    return pa_csv.open_csv(
        file,
        read_options=pa_csv.ReadOptions(block_size=BLOCK),
        parse_options=pa_csv.ParseOptions(invalid_row_handler=skip, **quoting),
        convert_options=converting,
    )


def _keep(of: File, tag: str, columns: list[str]) -> tuple[Path, dict[str, Any]]:
    """Returns the Arrow file of some columns of a table, and what is noted in it."""
    odd: list[int] = []
    with _explained(of), storage.opened(of) as file:
        schema, _ = _batches(of, file, columns, odd)
    noted: dict[str, Any] = {"left_out": {}}
    try:
        path = index_file.write(of, tag, schema, lambda: _tables(of, columns, odd), noted)
        if odd:  # which is only known now, and noted at the beginning of the file
            noted = {"left_out": {"row of another length": len(odd)}}
            path = index_file.write(of, tag, schema, lambda: _tables(of, columns, odd), noted)
    except pa.ArrowException as error:
        raise UserError(str(error)) from error
    return path, noted


def _tables(of: File, columns: list[str], odd: list[int]) -> Iterator[pa.Table]:
    """Yields the table in parts; `odd` is filled anew."""
    odd.clear()
    try:
        with _explained(of), storage.opened(of) as file:
            schema, batches = _batches(of, file, columns, odd)
            for batch in batches:
                yield pa.Table.from_batches([batch]).select(columns).cast(schema)
    except UserError as error:  # not for want of a place to write to
        raise pa.ArrowInvalid(str(error)) from error


def _batches(
    of: File, file: io.IOBase, columns: list[str], odd: list[int]
) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    if of.path.endswith(".parquet"):
        table = pq.ParquetFile(file)
        kinds = [(name, _plain(table.schema_arrow.field(name).type)) for name in columns]
        return pa.schema(kinds), table.iter_batches(columns=columns)
    batches = _open_csv(of, file, odd, columns)
    return batches.schema, batches


@contextlib.contextmanager
def _explained(of: File) -> Iterator[None]:
    try:
        with storage.as_os_errors():
            yield
    except OSError as error:
        raise UserError(f"{of.path} cannot be read as a table: {' '.join(str(error).split())}") from error
