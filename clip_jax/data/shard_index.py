"""Where the records of a tar shard lie: made once, by its headers, and mapped into memory from then on.

    00017.tar                   the shard
    00017.tar.3f2a90c1.index    its index, an Arrow file: a row a record; what was left out and why, in its metadata

The name says for which choice of records it is. Several processes share the work without a word: each takes what is
missing in an order of its own, and looks again before each.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import joblib
import numpy as np
import pyarrow as pa
import rich.console
import rich.progress

from clip_jax.data import captions, index_file, storage, tar
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.storage import File
from clip_jax.data.transforms import check_size, header_size
from clip_jax.errors import UserError

VERSION = 1
HEAD = 4096  # bytes of an image, in which its size usually stands
LONGEST_HEADER = 1 << 24  # bytes in which it must stand, behind whatever metadata
QUIET_SECONDS = 10  # between two lines where there is no terminal to draw a bar on
FEW_BYTES = 1 << 27  # of shards, that are sooner read than processes are started


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which records of a shard count, and what is read of them."""

    image_keys: tuple[str, ...]  # the first that a record has
    caption_keys: tuple[str, ...]  # all that it has: "txt", or a field of a JSON file, "json.caption"
    min_image_size: int  # pixels of the shorter side
    max_image_pixels: int

    @functools.cached_property
    def caption_files(self) -> tuple[str, ...]:
        """The kinds of file that captions are in, in order, each once."""
        return tuple(dict.fromkeys(key.partition(".")[0] if is_json(key) else key for key in self.caption_keys))

    def tag(self) -> str:
        return index_file.tag_of(VERSION, dataclasses.asdict(self))


def is_json(key: str) -> bool:
    return key.partition(".")[0] == "json"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of a shard without looking at its records."""

    records: int
    image_bytes: int
    left_out: dict[str, int]  # by the words of a `Problem`
    broken: str | None = None  # what is wrong with the shard itself
    downloads: dict[str, int] = dataclasses.field(default_factory=dict)  # what img2dataset counted


class ShardIndex:
    """The index of one shard, mapped.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, path: Path, records: int):
        table = index_file.mapped(path)
        if len(table) != records:
            raise index_file.damaged(path)
        self.blocks = [_column(table, name) for name in table.column_names if name.endswith("_block")]
        self.sizes = [_column(table, name) for name in table.column_names if name.endswith("_size")]
        self.check = _column(table, "check")
        self._keys, self._pages = table.column("key"), index_file.pages_of(table)

    def key(self, row: int) -> str:
        return os.fsdecode(self._keys[row].as_py())

    def let_go(self) -> None:
        """Takes what was read of it out of this process's memory."""
        index_file.let_go(self._pages)


def _column(table: pa.Table, name: str) -> np.ndarray:
    """Returns a column as it is mapped; not by Arrow's `to_numpy`, which imports pandas where there is one."""
    column = table.column(name)
    if not column.num_chunks:
        return np.zeros(0, np.uint32)
    return np.frombuffer(column.chunk(0).buffers()[1], np.uint32, len(column))


def summary_of(path: Path, shard: File) -> Summary | None:
    """Returns what an index says of its shard; None: it is none, or that of another shard or of an older state."""
    noted = index_file.noted_in(path, shard)
    return None if noted is None else Summary(**noted)


def find(shard: File, choice: Choice) -> tuple[Path, Summary] | None:
    """Returns the index of a shard where there is a good one."""
    found = index_file.find(shard, choice.tag())
    return None if found is None else (found[0], Summary(**found[1]))


def find_or_make(shards: Sequence[File], choice: Choice) -> list[tuple[Path, Summary]]:
    """Returns the index of every shard; those that are missing are made, on all cores.

    Raises:
        UserError: there is no place to keep them, or a process that made them has died.
    """
    elsewhere = any(storage.is_url(shard.path) for shard in shards)
    with concurrent.futures.ThreadPoolExecutor(storage.AT_ONCE if elsewhere else 1) as pool:
        found = list(pool.map(find, shards, [choice] * len(shards)))
    missing = [i for i, index in enumerate(found) if index is None]
    random.Random().shuffle(missing)
    few = sum(shards[i].size for i in missing) < FEW_BYTES
    workers = 0 if few else min(len(missing), joblib.cpu_count())
    with _Progress(len(missing)) as progress:
        for i, index in zip(missing, _made([shards[i] for i in missing], choice, workers), strict=True):
            found[i] = index
            progress.advance(index[1])
    return found


def _made(shards: list[File], choice: Choice, workers: int) -> Iterable[tuple[Path, Summary]]:
    if not workers:
        yield from (make(shard, choice) for shard in shards)
        return
    # Not forked: this process may have threads, of jax and of others.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(make, shards, [choice] * len(shards))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                "a process that read shards for their index has died: out of memory, or it ran a script of yours that "
                "has no `if __name__ == '__main__':`; start again: what was made so far stays"
            ) from error


def make(shard: File, choice: Choice) -> tuple[Path, Summary]:
    """Returns the index of a shard: read, and written whole in the first place that can be written.

    Raises:
        UserError: there is no such place, or the shard cannot be read at all.
    """
    if found := find(shard, choice):  # another process was quicker
        return found
    table, summary = scan(shard, choice)
    return index_file.write(shard, choice.tag(), table.schema, lambda: [table], dataclasses.asdict(summary)), summary


def scan(shard: File, choice: Choice) -> tuple[pa.Table, Summary]:
    """Returns the rows of all records that count, and why others do not.

    Raises:
        UserError: the shard cannot be read, also after some patience.
    """
    try:
        return storage.patiently(lambda: _scan(shard, choice))
    except OSError as error:
        raise storage.explained(shard.path, error) from error


@dataclasses.dataclass
class _Found:
    """A file of a record: where, and what was seen in it."""

    member: tar.Member
    problem: Problem = Problem.NONE


def _scan(shard: File, choice: Choice) -> tuple[pa.Table, Summary]:
    """Reads a shard once, from its beginning to its end: that is quickest where it comes over a network."""
    kinds = {*choice.image_keys, *choice.caption_files, "json"}
    records: dict[str, dict[str, _Found]] = {}
    twice, broken = set(), None
    with storage.reader(shard) as read:
        try:
            for member in tar.members(read, shard.size):
                key, kind = _split(member.name)
                if kind in kinds:
                    files = records.setdefault(key, {})
                    if kind in files:
                        twice.add(key)
                    files[kind] = _looked_at(member, kind, choice, read)
        except tar.BrokenTarError as error:
            broken = str(error)
    rows, left_out = [], collections.Counter()
    for key, files in records.items():
        try:
            if key in twice:
                raise BadRecord(Problem.DUPLICATE)
            rows.append((os.fsencode(key), _chosen(files, choice)))
        except BadRecord as error:
            left_out[error.problem.words] += 1
    downloads = _downloads(shard)
    if broken is None and len(records) < downloads.get("successes", 0):
        broken = f"has {len(records):,} of the {downloads['successes']:,} records that its _stats.json counts"
    image_bytes = sum(files[0].member.size for _, files in rows)
    return _table(rows, choice), Summary(len(rows), image_bytes, dict(left_out), broken, downloads)


def _split(name: str) -> tuple[str, str]:
    """Returns (key, kind) of a member's name: what comes before the first dot of its last part, and what after it.

    As in webdataset, whose records are the files of equal key. A name without either is of no record.
    """
    folder, slash, last = name.rpartition("/")
    key, _, kind = last.partition(".")
    return (f"{folder}{slash}{key}", kind.lower()) if key else ("", "")


def _looked_at(member: tar.Member, kind: str, choice: Choice, read: tar.Read) -> _Found:
    """Returns a file of a record with what is wrong with it."""
    try:
        if kind in choice.image_keys:
            _check_image(member, choice, read)
        elif kind == "json":
            content = captions.parsed(read(member.start, min(member.size, LONGEST_HEADER)))
            if isinstance(status := content.get("status"), str) and status != "success":
                raise BadRecord(Problem.STATUS)
            fields = [key.split(".")[1:] for key in choice.caption_keys if is_json(key)]
            if fields:
                captions.of(text for field in fields for text in captions.within(content, field))
        else:
            captions.of([read(member.start, min(member.size, captions.LONGEST + 1))])
    except BadRecord as error:
        return _Found(member, error.problem)
    return _Found(member)


def _check_image(member: tar.Member, choice: Choice, read: tar.Read) -> None:
    """Raises BadRecord for a file that is no image, or one of another size than is wanted, by its header."""
    if member.size >= 1 << 32:
        raise BadRecord(Problem.TOO_LARGE)
    try:
        width, height = header_size(read(member.start, min(member.size, HEAD)))
    except BadRecord:
        width, height = header_size(read(member.start, min(member.size, LONGEST_HEADER)))
    check_size(width, height, choice.min_image_size, choice.max_image_pixels)


def _chosen(files: dict[str, _Found], choice: Choice) -> list[_Found | None]:
    """Returns a record's image, and its files of captions (None: it has none of that kind).

    Raises:
        BadRecord: it does not count.
    """
    if (status := files.get("json")) and status.problem is Problem.STATUS:
        raise BadRecord(Problem.STATUS)
    image = next((files[key] for key in choice.image_keys if key in files), None)
    if image is None:
        raise BadRecord(Problem.NO_IMAGE)
    texts = [files.get(kind) for kind in choice.caption_files]
    good = [text if text and not text.problem else None for text in texts]
    if not any(good):
        raise BadRecord(next((text.problem for text in texts if text), Problem.NO_CAPTION))
    if image.problem:
        raise BadRecord(image.problem)
    return [image, *good]


def _downloads(shard: File) -> dict[str, int]:
    """Returns what img2dataset says beside the shard of how it came to be: of how many it tried, how many failed."""
    path = shard.path.removesuffix(".tar") + "_stats.json"
    try:
        stats = json.loads(storage.read_if_there(path) or b"{}")
    except (OSError, ValueError):
        return {}
    names = ("count", "successes", "failed_to_download", "failed_to_resize")
    return {name: stats[name] for name in names if isinstance(stats, dict) and isinstance(stats.get(name), int)}


def _table(rows: list[tuple[bytes, list[_Found | None]]], choice: Choice) -> pa.Table:
    columns = {"key": _keys([key for key, _ in rows])}
    for place, kind in enumerate(("image", *choice.caption_files)):
        members = [files[place].member if files[place] else None for _, files in rows]
        columns[f"{kind}_block"] = _numbers([m.start // tar.BLOCK if m else 0 for m in members])
        columns[f"{kind}_size"] = _numbers([m.size if m else 0 for m in members])
    columns["check"] = _numbers([check_of([f.member.check for f in files if f]) for _, files in rows])
    return pa.table(columns)


# Not by `pa.array`, which imports pandas where there is one: a quarter of a second for every process.


def _numbers(values: list[int]) -> pa.Array:
    return pa.Array.from_buffers(pa.uint32(), len(values), [None, pa.py_buffer(np.array(values, np.uint32))])


def _keys(keys: list[bytes]) -> pa.Array:
    ends = np.cumsum([0, *map(len, keys)], dtype=np.int32)
    return pa.Array.from_buffers(pa.binary(), len(keys), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(keys))])


def check_of(checks: Iterable[int]) -> int:
    """Returns one number for the headers of a record's files."""
    return zlib.crc32(np.fromiter(checks, np.uint32).tobytes())


class _Progress:
    """A bar over shards; where there is no terminal, a line now and then. Nothing where there is nothing to do."""

    def __init__(self, shards: int):
        console = rich.console.Console(stderr=True)
        columns = (
            rich.progress.TextColumn("index of"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("shards"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[rate]:,.0f} records/s"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
        )
        self._console = console
        self._bar = rich.progress.Progress(*columns, console=console, disable=not (console.is_terminal and shards))
        self._task = self._bar.add_task("", total=shards, rate=0)
        self._shards, self._done, self._records = shards, 0, 0
        self._started = self._said = time.monotonic()

    def advance(self, summary: Summary) -> None:
        self._done += 1
        self._records += summary.records + sum(summary.left_out.values())
        now = time.monotonic()
        rate = self._records / max(now - self._started, 1e-9)
        self._bar.update(self._task, advance=1, rate=rate)
        if not self._console.is_terminal and now - self._said > QUIET_SECONDS:
            self._said = now
            self._console.print(f"index of {self._done}/{self._shards} shards · {rate:,.0f} records/s", highlight=False)

    def __enter__(self) -> "_Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._bar.__exit__(*error)
