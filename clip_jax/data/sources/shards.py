"""`wds:` — tar shards as img2dataset and webdataset write them, by the byte indexes of their records."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data import captions, shard_index, storage, tar
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.shard_index import Choice, ShardIndex, Summary
from clip_jax.data.sources.source import Inventory, Keys, Record
from clip_jax.data.storage import File
from clip_jax.errors import UserError

NEAR = 1 << 16  # bytes between two files of a record, that are sooner read than asked for apart
MAX_MAPPED = 4096  # indexes that a process keeps mapped
MAX_HELD = 256  # mapped ones, of which what was read may stay in its memory


class TarShards:
    """The records of tar shards, local or behind a URL, in their order. Indexes are made where they are missing."""

    def __init__(self, shards: Sequence[File], keys: Keys):
        choice = Choice(
            tuple(key.lower() for key in keys.images_or("jpg;jpeg;png;webp")),
            tuple(key if shard_index.is_json(key) else key.lower() for key in keys.captions_or("txt")),
            keys.min_image_size,
            keys.max_image_pixels,
        )
        indexes = shard_index.find_or_make(shards, choice)
        self.name = storage.name_of(shards[0].path.rpartition("/")[0]) or "shards"
        self.split, self.classnames, self.templates = "all", (), ()
        self._choice, self._shards = choice, shards
        self._names = _relative([shard.path for shard in shards])
        self._paths, self._summaries = [str(path) for path, _ in indexes], [summary for _, summary in indexes]
        self._ends = np.cumsum([summary.records for summary in self._summaries])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """Returns (shard, row)."""
        shard = int(np.searchsorted(self._ends, index, "right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def __getitem__(self, index: int) -> Record:
        place, row = self._place(index)
        files, check, name = self._row(place, row)
        present = [file for file in files if file[0]]
        contents = dict(zip(present, _contents(self._shards[place], present, check), strict=True))
        image, *texts = (contents.get(file) for file in files)
        found = dict(zip(self._choice.caption_files, texts, strict=True))
        values = []
        for key in self._choice.caption_keys:
            kind, *field = key.split(".") if shard_index.is_json(key) else (key,)
            if found[kind] is not None:
                values += captions.within(captions.parsed(found[kind]), field) if field else [found[kind]]
        return Record(image, captions.of(values), None, name)

    def _row(self, place: int, row: int) -> tuple[list[tuple[int, int]], int, str]:
        """Returns (start, size) of a record's files, the check of their headers, and the record's key.

        Look-ups here and there soon have read every index from end to end: 400 MB of ten million records. So where
        there are many indexes, each is let go of at once, for 25 µs a look-up.
        """
        rows = _mapped(self._paths[place], self._shards[place])
        spans = zip(rows.blocks, rows.sizes, strict=True)
        files = [(int(blocks[row]) * tar.BLOCK, int(sizes[row])) for blocks, sizes in spans]
        found = files, int(rows.check[row]), rows.key(row)
        if _opened.cache_info().currsize > MAX_HELD:
            rows.let_go()
        return found

    def shard_of(self, index: int) -> str:
        return self._names[self._place(index)[0]]

    def fingerprint(self) -> dict[str, Any]:
        """Returns records and size of every shard; where they lie does not count, nor when they were copied there."""
        known = zip(self._names, self._summaries, self._shards, strict=True)
        return {
            "source": "wds",
            "records": len(self),
            "shards": {name: {"records": summary.records, "size": shard.size} for name, summary, shard in known},
        }

    def inventory(self) -> Inventory:
        known = zip(self._names, self._summaries, strict=True)
        return Inventory.of_all({name: _inventory(summary) for name, summary in known})


def matching(pattern: str, keys: Keys) -> TarShards:
    """Returns the records of the shards that a pattern names.

    Raises:
        UserError: there is no such shard, or no record in them that counts.
    """
    # Sorted: their order is that of the records, which a pattern that names the same shards must not change.
    source = TarShards(sorted(storage.look_up(storage.expand(pattern, ".tar"))), keys)
    if not len(source):
        raise UserError(f"{pattern!r} has no record to train on: {source.inventory().why_empty()}")
    return source


def _contents(shard: File, files: list[tuple[int, int]], check: int) -> list[bytes]:
    """Returns the contents of a record's files, whose headers are looked at: the shard may have changed."""
    first, last = min(start for start, _ in files) - tar.BLOCK, max(start + size for start, size in files)
    if last - first <= sum(size for _, size in files) + NEAR:
        data = storage.read(shard.path, first, last - first, stamp=shard.stamp)
        parts = [data[start - tar.BLOCK - first : start + size - first] for start, size in files]
    else:
        apart = [(start - tar.BLOCK, size + tar.BLOCK) for start, size in files]
        parts = [storage.read(shard.path, start, size, stamp=shard.stamp) for start, size in apart]
    whole = all(len(part) == tar.BLOCK + size for part, (_, size) in zip(parts, files, strict=True))
    if not whole or shard_index.check_of([tar.check_of(part[: tar.BLOCK]) for part in parts]) != check:
        raise BadRecord(Problem.CHANGED)
    return [part[tar.BLOCK :] for part in parts]


def _inventory(summary: Summary) -> Inventory:
    broken = {"": summary.broken} if summary.broken else {}
    return Inventory(1, summary.image_bytes, summary.left_out, broken, summary.downloads)


def _mapped(path: str, shard: File) -> ShardIndex:
    """Returns the index of a shard, as it was when the source was opened.

    Raises:
        BadRecord: the shard has changed, and with it its index.
    """
    if (rows := _opened(path, shard)) is None:
        raise BadRecord(Problem.CHANGED)
    return rows


@functools.lru_cache(MAX_MAPPED)
def _opened(path: str, shard: File) -> ShardIndex | None:
    summary = shard_index.summary_of(Path(path), shard)
    return ShardIndex(Path(path), summary.records) if summary else None


def _relative(paths: list[str]) -> list[str]:
    """Returns the paths without the folders that they have in common."""
    folders = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, folders))
    return ["/".join(path.split("/")[common:]) for path in paths]
