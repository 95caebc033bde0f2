"""A data set through a model, on all devices: every record once, in order, and what cannot be read counted."""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from clip_jax import distributed
from clip_jax.data.pipeline import EvaluationRows, evaluation_batches
from clip_jax.data.problems import Problem
from clip_jax.data.sources import Record, Source
from clip_jax.errors import UserError
from clip_jax.evaluation.on_mesh import FEATURES, OnMesh
from clip_jax.evaluation.progress import progress
from clip_jax.typing import Float, Int

HELD = 1 << 14  # texts that are tokenized at once


class Part(NamedTuple):
    """A batch of a data set; what cannot be read has no row."""

    features: jax.Array  # [batch, E] on the mesh, of which these are the rows that count
    rows: Int[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]  # of their records in the source
    records: list[Record]  # without images


class Images:
    """The images of a data set through a model; to iterate is to encode them. All processes do it alike."""

    def __init__(self, model: OnMesh, source: Source, *, feature: str = FEATURES[0], shows: bool = True):
        self.model, self.source = model, source
        self._feature, self._shows = feature, shows
        self.left_out: collections.Counter[str] = collections.Counter()  # records that cannot be read, by reason

    def __iter__(self) -> Iterator[Part]:
        """Yields every record of the source once.

        Raises:
            UserError: what a record says does not go with its data set, in every process the same; or nothing could
                be read.
        """
        model, source, arch = self.model, self.source, self.model.architecture
        self.left_out.clear()
        batches = evaluation_batches(
            source,
            image_size=arch.image.image_size,
            preprocess=arch.preprocess,
            global_batch=model.batch,
            rows=model.rows,
        )
        seen = 0
        with progress(f"{source.name}:{source.split}", len(source), "images", shows=self._shows) as advance:
            for image, facts in _shared(batches, model.rows):
                features = model.encode_image(image, self._feature)
                kept = [(row, index, record) for row, index, record, problem in facts if not problem]
                self.left_out.update(Problem(problem).words for *_, problem in facts if problem)
                assert [index for _, index, *_ in facts] == list(range(seen, seen + len(facts)))
                seen += len(facts)
                advance(len(facts))
                if kept:
                    rows, index, records = zip(*kept, strict=True)
                    yield Part(features, np.array(rows), np.array(index), list(records))
        assert seen == len(source), "every record counts once"
        if sum(self.left_out.values()) == seen:
            why = ", ".join(f"{words} {count:,}" for words, count in self.left_out.items())
            raise UserError(f"no image of {source.name}:{source.split} can be read: {why}")


Fact = tuple[int, int, Record | None, int]  # row of the batch, index in the source, record, problem


def _shared(batches: Iterator[EvaluationRows], rows: Sequence[int]) -> Iterator[tuple[np.ndarray, list[Fact]]]:
    """Yields this process's images and what is known of all processes' rows, in order.

    Raises:
        UserError: what one of them has found; the others would wait for it on the devices.
    """
    if jax.process_count() == 1:
        yield from ((part.image, _facts(part, rows)) for part in batches)
        return
    while True:
        part, mistake = None, None
        try:
            part = next(batches, None)
        except UserError as error:
            mistake = str(error)
        mine = [] if part is None else _facts(part, rows)
        told = distributed.gather([mistake, [(row, at, record and record[1:], bad) for row, at, record, bad in mine]])
        if mistakes := [mistake for mistake, _ in told if mistake is not None]:
            raise UserError(mistakes[0])
        if part is None:  # then all have come to the end: a batch is everybody's
            return
        by_row = {row: (at, record, bad) for _, facts in told for row, at, record, bad in facts}  # some are of several
        yield part.image, [(row, at, _arrived(record), bad) for row, (at, record, bad) in sorted(by_row.items())]


def _facts(part: EvaluationRows, rows: Sequence[int]) -> list[Fact]:
    """Returns what is known of this process's rows, but for those behind the last record."""
    known = zip(rows, part.index.tolist(), part.records, part.problem.tolist(), strict=True)
    return [fact for fact in known if fact[1] >= 0]


def _arrived(record: list | None) -> Record | None:
    """Returns a record that has come from another process."""
    if record is None:
        return None
    captions, label, id = record
    return Record(b"", tuple(captions), label, id)


def encode_texts(model: OnMesh, texts: Sequence[str], *, shows: bool = False) -> Float[np.ndarray, "B E"]:
    """Returns the L2-normalised embedding of every text, in every process; what is too long loses its end.

    Texts of one length are computed together, and no further than they are long.

    Raises:
        UserError: embeddings that are not finite.
    """
    features = None
    with progress("texts", len(texts), "texts", shows=shows) as advance:
        for start in range(0, len(texts), HELD):
            tokens = model.tokenize(texts[start : start + HELD])
            for rows, some in _of_one_length(tokens, model):
                found = model.gathered(model.encode_text(some))[: len(rows)]
                if features is None:
                    features = np.empty((len(texts), found.shape[1]), np.float32)
                features[start + rows] = found
                advance(len(rows))
    assert features is not None, "no text"
    return finite(features, model)


def _of_one_length(
    tokens_BL: Int[np.ndarray, "B L"], model: OnMesh
) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, "_ M"]]]:
    """Yields (which texts these are, a whole batch of tokens whose first rows are theirs)."""
    lengths = model.text_lengths(tokens_BL)
    for length in np.unique(lengths):
        of_length = np.flatnonzero(lengths == length)
        for start in range(0, len(of_length), model.batch):
            rows = of_length[start : start + model.batch]
            yield rows, np.resize(tokens_BL[rows, :length], (model.batch, length))


def finite(features: np.ndarray, model: OnMesh) -> np.ndarray:
    """Returns the features; NaN compares with nothing, so every metric of a diverged model would be perfect."""
    if not np.isfinite(features).all():
        raise UserError(
            f"{model.pretrained} gives embeddings that are not finite: it has diverged; take an earlier one"
        )
    return features
