"""Features on disk, in the layout of clip-retrieval's inference, so that what reads its folders reads ours:

FOLDER/features.json                      whose they are; ours, and written first
FOLDER/img_emb/img_emb_{i}.npy            float32 [rows, width]
FOLDER/text_emb/text_emb_{i}.npy          those of first captions, where records have captions
FOLDER/metadata/metadata_{i}.parquet      image_path and caption; and ours: index in the source, label

Row j of a chunk is row j of all its files; what cannot be read has no row.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from clip_jax import distributed
from clip_jax.data.sources import Record, Source
from clip_jax.data.sources.mixture import Range
from clip_jax.elsewhere import is_elsewhere
from clip_jax.errors import UserError, nearest
from clip_jax.evaluation.chunks import Chunks
from clip_jax.evaluation.encode import Images, Part, encode_texts, finite
from clip_jax.evaluation.on_mesh import FEATURES, OnMesh
from clip_jax.evaluation.progress import say
from clip_jax.evaluation.tasks import digest
from clip_jax.files import children, read_json, whole, write_text
from clip_jax.typing import Float

CHUNK = 100_000  # records; what is in memory at once
ABOUT = "features.json"
IMAGES, TEXTS, METADATA = "img_emb", "text_emb", "metadata"  # folders, and what their files' names begin with
SUFFIXES = {IMAGES: "npy", TEXTS: "npy", METADATA: "parquet"}


class Place(NamedTuple):
    """Where the chunks of so many records lie."""

    folder: Path
    records: int
    chunk: int

    @property
    def chunks(self) -> int:
        return -(-self.records // self.chunk)

    def file(self, kind: str, i: int) -> Path:
        """Returns a file of a chunk; numbers have zeros before them, so that names sort as numbers do."""
        return self.folder / kind / f"{kind}_{i:0{len(str(self.chunks))}d}.{SUFFIXES[kind]}"


class Layout(NamedTuple):
    """What all chunks of a folder have alike."""

    width: int  # of image features
    captions: bool
    labels: bool


def write(model: OnMesh, source: Source, folder: Path, *, feature: str = FEATURES[0], chunk: int = CHUNK) -> None:
    """Writes the features of a data set; where that was begun before, chunks that are complete stay as they are.

    `feature` is what is taken of images, one of `FEATURES`; of texts it is always their embedding. Whether records have
    captions and labels, the first that can be read say: what lacks a caption then has an empty one. All processes call
    it alike; the first one writes.

    Raises:
        UserError: the folder is of something else, or cannot be written; or nothing could be read.
    """
    _check(folder, feature, chunk)
    place = Place(folder, len(source), chunk)
    facts = _facts(model, source, feature, chunk)
    rows, layout = distributed.of_first(lambda: _begun(place, facts))
    layout = layout and Layout(*layout)
    left_out, known = collections.Counter(), [n for n in rows if n is not None]
    if known:
        said = f"{folder}: {len(known):,} of {place.chunks:,} chunks were there"
        say(f"{said}, without {_missing(place, rows):,} records" if _missing(place, rows) else said)
    for span in _spans([i for i, n in enumerate(rows) if n is None]):
        start, stop = span.start * chunk, min(span.stop * chunk, len(source))
        images = Images(model, Range(source, start, stop), feature=feature)
        writer = _Writer(model, place, layout, span.start)
        for part in images if layout is None else _readable(images):
            writer.add(part, start)
        writer.finish(span.stop)
        layout = writer.layout
        left_out.update(images.left_out)
    for words, count in left_out.most_common():
        say(f"{source.name}:{source.split}: left out: {words} {count:,}")


def _check(folder: Path, feature: str, chunk: int) -> None:
    if feature not in FEATURES:
        raise UserError(f"unknown feature {feature!r}{nearest(feature, FEATURES)}")
    if chunk < 1:
        raise UserError(f"{chunk=} should be at least 1: the records of a file")
    if is_elsewhere(folder):
        raise UserError(f"{folder} is in storage elsewhere: features are written to a folder of this machine")


def _facts(model: OnMesh, source: Source, feature: str, chunk: int) -> dict[str, Any]:
    """Returns whose features these are: chunks of others are none of theirs."""
    facts = {"model": model.name, "pretrained": model.pretrained, "dataset": source.name, "split": source.split}
    facts |= {"feature": feature, "dtype": "float32", "records": len(source), "chunk": chunk}
    return facts | {"weights": model.fingerprint, "data": digest(source.fingerprint())}


def _begun(place: Place, facts: dict[str, Any]) -> tuple[list[int | None], Layout | None]:
    """Returns the rows of every chunk, None where it is not complete, and what those that are have alike.

    Raises:
        UserError: the folder has features of something else.
    """
    file = place.folder / ABOUT
    if not file.exists():
        if any((place.folder / kind).exists() for kind in SUFFIXES):
            raise UserError(f"{place.folder} has features already, and no {ABOUT} says whose; choose another folder")
        write_text(file, json.dumps(facts, indent=2) + "\n")
        return [None] * place.chunks, None
    found = read_json(file)
    found = found if isinstance(found, dict) else {}
    if differs := [
        f"{key} {found.get(key)!r}, not {value!r}" for key, value in facts.items() if found.get(key) != value
    ]:
        raise UserError(
            f"{place.folder} has other features: {'; '.join(differs)}; choose another folder, or delete this one"
        )
    rows, layout = [], None
    for i in range(place.chunks):
        one = _complete(place, i, layout)
        rows.append(one and one[0])
        layout = one[1] if one else layout
    return rows, layout


def _complete(place: Place, i: int, like: Layout | None) -> tuple[int, Layout] | None:
    """Returns how many rows a chunk has, and its layout; None: a file is missing, or does not go with the others."""
    try:
        metadata = pq.read_metadata(place.file(METADATA, i))
        names = metadata.schema.names
        kinds = [IMAGES, TEXTS] if "caption" in names else [IMAGES]
        images, *texts = (_array(place.file(kind, i)) for kind in kinds)
    except (OSError, pa.ArrowException, UserError):
        return None
    layout = Layout(images.shape[1], "caption" in names, "label" in names)
    alike = {metadata.num_rows, *map(len, (images, *texts))} == {len(images)}
    sound = images.dtype == np.float32 and len(images) <= place.chunk
    return (len(images), layout) if alike and sound and like in (None, layout) else None


def _missing(place: Place, rows: Sequence[int | None]) -> int:
    """Returns how many records the chunks that are there have left out."""
    sizes = (min(place.chunk, place.records - i * place.chunk) for i in range(place.chunks))
    return sum(size - n for size, n in zip(sizes, rows, strict=True) if n is not None)


def _spans(chunks: Sequence[int]) -> Iterator[range]:
    """Yields the numbers, those that follow each other as one range."""
    for _, run in itertools.groupby(enumerate(chunks), lambda pair: pair[1] - pair[0]):
        numbers = [i for _, i in run]
        yield range(numbers[0], numbers[-1] + 1)


def _readable(images: Images) -> Iterator[Part]:
    """Yields what can be read, which of the rest of a data set may be nothing."""
    try:
        yield from images
    except UserError:
        if images.left_out.total() < len(images.source):
            raise


class _Writer:
    """Collects the rows of one chunk after the other, and writes each when it is past."""

    def __init__(self, model: OnMesh, place: Place, layout: Layout | None, at: int):
        self.layout = layout  # None: the first rows say
        self._model, self._place, self._at = model, place, at
        self._features: list[Float[np.ndarray, "n E"]] = []
        self._index: list[int] = []  # in the source
        self._records: list[Record] = []

    def add(self, part: Part, start: int) -> None:
        """Takes a batch of records, whose range begins at `start` in the source."""
        features_nE = finite(self._model.gathered(part.features)[part.rows], self._model)
        if self.layout is None:
            captions, labels = ([getattr(x, name) for x in part.records] for name in ("captions", "label"))
            self.layout = Layout(features_nE.shape[1], any(captions), any(label is not None for label in labels))
        index = part.index + start
        chunks = index // self._place.chunk
        for i in np.unique(chunks).tolist():
            self.finish(i)
            rows = np.flatnonzero(chunks == i)
            self._features.append(features_nE[rows])
            self._index += index[rows].tolist()
            self._records += [part.records[row] for row in rows]

    def finish(self, until: int) -> None:
        """Writes the chunks before one: those without rows, too.

        Raises:
            UserError: in every process, when the first cannot write.
        """
        while self._at < until:
            assert self.layout is not None, "nothing was read, and that is an error"
            nothing = np.empty((0, self.layout.width), np.float32)
            arrays = {IMAGES: np.concatenate([nothing, *self._features])}
            firsts = [_sound(record.captions[0]) if record.captions else "" for record in self._records]
            if self.layout.captions:
                width = self._model.architecture.embed_dim
                arrays[TEXTS] = encode_texts(self._model, firsts) if firsts else np.empty((0, width), np.float32)
            metadata = _metadata(self._index, self._records, firsts, self.layout)
            distributed.of_first(functools.partial(_write_files, self._place, self._at, arrays, metadata))
            self._features, self._index, self._records = [], [], []
            self._at += 1


def _metadata(index: Sequence[int], records: Sequence[Record], firsts: Sequence[str], layout: Layout) -> pa.Table:
    """Returns the columns of a chunk."""
    names = [_sound(record.id) or str(i) for i, record in zip(index, records, strict=True)]
    columns = {"image_path": pa.array(names, pa.string())}
    if layout.captions:
        columns["caption"] = pa.array(firsts, pa.string())
    columns["index"] = pa.array(index, pa.int64())
    if layout.labels:
        columns["label"] = pa.array([record.label for record in records], pa.int64())
    return pa.table(columns)


def _sound(text: str) -> str:
    """Returns the text without what is no Unicode, which the names of files may have."""
    return text.encode("utf-8", "replace").decode()


def _write_files(place: Place, i: int, arrays: Mapping[str, np.ndarray], metadata: pa.Table) -> None:
    """Writes the files of a chunk, each whole."""
    for kind, rows in arrays.items():
        with whole(place.file(kind, i)) as temporary:
            np.save(temporary, rows)
    with whole(place.file(METADATA, i)) as temporary:
        pq.write_table(metadata, temporary)


@dataclasses.dataclass(frozen=True)
class Features:
    """What a folder has: row i of all is of one record."""

    images: Chunks
    texts: Chunks | None  # None: there are none
    files: tuple[Path, ...]  # of metadata

    @functools.cached_property
    def metadata(self) -> pa.Table:
        """Returns a row for every record, read when it is first asked for.

        Raises:
            UserError: a file is damaged.
        """
        tables = []
        for file in self.files:
            with _explained(file):
                tables.append(pq.read_table(file, memory_map=True))
        return pa.concat_tables(tables, promote_options="default")


def read(folder: Path) -> Features:
    """Returns the features in a folder, clip-retrieval's or ours, mapped into memory.

    Raises:
        UserError: there are none, or not all; a file is damaged, or does not go with the others.
    """
    files = {kind: _numbered(folder, kind) for kind in SUFFIXES}
    if not files[IMAGES]:
        raise UserError(f"{folder} has no features: there is no {IMAGES}/{IMAGES}_0.npy in it")
    if not files[TEXTS]:
        del files[TEXTS]
    _check_count(folder, {kind: len(found) for kind, found in files.items()})
    arrays = {kind: [_array(file) for file in files[kind]] for kind in files if kind != METADATA}
    metadata = [_rows_of(file) for file in files[METADATA]]
    rows = {kind: [len(part) for part in parts] for kind, parts in arrays.items()} | {METADATA: metadata}
    for i, counts in enumerate(zip(*rows.values(), strict=True)):
        if len(set(counts)) > 1:
            said = ", ".join(f"{files[kind][i]} {n:,}" for kind, n in zip(rows, counts, strict=True))
            raise UserError(f"the files of a chunk should have as many rows: {said}; write the features anew")
    for kind, parts in arrays.items():
        for file, part in zip(files[kind], parts, strict=True):
            if (part.shape[1], part.dtype) != (parts[0].shape[1], parts[0].dtype):
                raise UserError(f"{file} is not as {files[kind][0]} is: {part.dtype} × {part.shape[1]}; write it anew")
    return Features(Chunks(arrays[IMAGES]), Chunks(arrays[TEXTS]) if TEXTS in arrays else None, tuple(files[METADATA]))


def _check_count(folder: Path, counts: Mapping[str, int]) -> None:
    """Raises UserError when some files of a folder are missing."""
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{kind} {n}" for kind, n in counts.items())
        raise UserError(f"{folder} should have as many files of each kind: {said}; run what wrote them again")
    if (folder / ABOUT).exists():  # clip-retrieval's own has none
        facts = read_json(folder / ABOUT)
        if not isinstance(facts, dict) or not all(isinstance(facts.get(key), int) for key in ("records", "chunk")):
            raise UserError(f"{folder / ABOUT} does not say how many records there are; write the features anew")
        wanted = Place(folder, facts["records"], facts["chunk"]).chunks
        if counts[IMAGES] != wanted:
            raise UserError(f"{folder} has {counts[IMAGES]} of {wanted} chunks: run what wrote them again, to go on")


def _numbered(folder: Path, kind: str) -> list[Path]:
    """Returns the files of a kind, by their numbers."""
    found = {}
    for file in children(folder / kind):
        if name := re.fullmatch(rf"{kind}_(\d+)\.{SUFFIXES[kind]}", file.name):
            found[int(name[1])] = file
    return [found[i] for i in sorted(found)]


def _array(file: Path) -> np.ndarray:
    """Returns the rows of a file, mapped into memory.

    Raises:
        UserError: it is damaged, or has something else than rows of floats.
    """
    with _explained(file):
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
        raise UserError(f"{file} should be a matrix of floats, a row an image or a text; write it anew")
    return found


def _rows_of(file: Path) -> int:
    """Returns how many rows a file of metadata has."""
    with _explained(file):
        return pq.read_metadata(file).num_rows


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}; write it anew") from error
