"""The order of the data, and the batches that come of it.

The order is a pure function of (seed, examples seen): to resume is to start at another number, on any number of hosts.
What is random about a record is a function of (seed, epoch, index): the same pixels whoever reads it.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from clip_jax import preemption
from clip_jax.architecture import Architecture, Preprocess
from clip_jax.config import Config
from clip_jax.data import storage, transforms
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources import Record, Source
from clip_jax.data.sources.mixture import Mixture
from clip_jax.errors import UserError
from clip_jax.tokenizer import Tokenizer, make
from clip_jax.typing import Batch, UInt8

MAX_THREADS = 16  # that read what is evaluated
CHUNK = 32  # pairs that one thread prepares, one after the other: what is read ahead is counted in these


@dataclasses.dataclass(frozen=True)
class Order:
    """An endless, shuffled pass over the records of one or several sources.

    Every epoch of a source has each of its records once, in an order of its own. Several sources have their turns in a
    cycle: with turns (3, 1), of every four examples that follow each other three are the first's.
    """

    lengths: tuple[int, ...]
    seed: int
    turns: tuple[int, ...] = (1,)

    def __post_init__(self):
        shuffled = []
        for i, length in enumerate(self.lengths):
            seed = self.seed if i == 0 else int(np.random.SeedSequence([self.seed, i]).generate_state(1)[0])
            shuffled.append(grain.MapDataset.range(length).seed(seed).shuffle().repeat())
        object.__setattr__(self, "_shuffled", tuple(shuffled))
        object.__setattr__(self, "_slots", _spread(self.turns))
        object.__setattr__(self, "_starts", tuple(itertools.accumulate(self.lengths, initial=0)))

    @classmethod
    def of(cls, source: Source, seed: int) -> "Order":
        if isinstance(source, Mixture) and source.turns is not None:
            return cls(source.lengths, seed, source.turns)
        return cls((len(source),), seed)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns (epoch of its source, index) of the example at a position, which counts the examples of all hosts."""
        cycle, slot = divmod(position, len(self._slots))
        source, before = self._slots[slot]
        position = cycle * self.turns[source] + before
        index = self._starts[source] + int(self._shuffled[source][position])
        return position // self.lengths[source], index


def _spread(turns: Sequence[int]) -> list[tuple[int, int]]:
    """Returns whose turn it is in a cycle, and how many it had in it: at every place the one's that lags most."""
    total, had, slots = sum(turns), [0] * len(turns), []
    for place in range(1, total + 1):
        lags = [turn * place - total * times for turn, times in zip(turns, had, strict=True)]
        source = lags.index(max(lags))
        slots.append((source, had[source]))
        had[source] += 1
    return slots


class HostBatch(NamedTuple):
    """This host's part of a global batch, or one pair of it, and where it comes from."""

    batch: Batch
    index: np.ndarray  # int64 [b], of the records in their source
    problem: np.ndarray  # uint8 [b], a `Problem`; NONE where `batch.valid`


@dataclasses.dataclass(frozen=True)
class TrainingPairs:
    """What this host reads: its rows of every global batch, one after the other. A Grain data source."""

    source: Source
    order: Order
    first: int  # examples seen by all hosts before
    last: int  # examples that all hosts will have seen in the end
    global_batch: int
    rows: Sequence[int]  # of the global batch, those that this host's devices hold
    image_size: int
    preprocess: Preprocess
    context_length: int
    tokenize: Tokenizer
    augmentation: transforms.Augmentation

    def __len__(self) -> int:
        return (self.last - self.first) // self.global_batch * len(self.rows)

    def __getitem__(self, i: int) -> HostBatch:
        """Returns a pair; in the place of one that cannot be read a black image without a text, which is not valid."""
        epoch, index = self._place(i)
        try:
            record, caption, random = self._drawn(epoch, index)
            image = transforms.training_crop(record.image, self.image_size, self.preprocess, self.augmentation, random)
            tokens = self.tokenize(caption, self.context_length, True)[0]
            problem = Problem.NONE
        except BadRecord as error:
            problem = error.problem
        except OSError:
            problem = Problem.UNREADABLE
        if problem:
            image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
            tokens = np.zeros(self.context_length, np.int32)
        return HostBatch(Batch(image, tokens, np.bool_(not problem)), np.int64(index), np.uint8(problem))

    def caption(self, i: int) -> str:
        """Returns the caption that a pair has.

        Raises:
            BadRecord, OSError: it has none.
        """
        return self._drawn(*self._place(i))[1]

    def _place(self, i: int) -> tuple[int, int]:
        """Returns (epoch, index) of a pair's record."""
        step, row = divmod(i, len(self.rows))
        return self.order[self.first + step * self.global_batch + self.rows[row]]

    def _drawn(self, epoch: int, index: int) -> tuple[Record, str, np.random.Generator]:
        """Returns a record, the caption that is its in this epoch, and its stream of randomness from there on."""
        record, random = read(self.source, index), randomness(self.order.seed, epoch, index)
        return record, record.captions[random.integers(len(record.captions))], random


def training_pairs(
    config: Config,
    arch: Architecture,
    tokenizer: str | None,
    source: Source,
    *,
    rows: Sequence[int],
    start: int = 0,
    last_step: int | None = None,
) -> TrainingPairs:
    """Returns what a host reads from step `start` on; `tokenizer` is what its tokenizer.json says, if it has one.

    It ends with `last_step`; None: with that of the config's duration on this source.
    """
    data = config.data
    last_step = config.steps(len(source)).total if last_step is None else last_step
    return TrainingPairs(
        source=source,
        order=Order.of(source, config.seed),
        first=start * data.global_batch,
        last=last_step * data.global_batch,
        global_batch=data.global_batch,
        rows=rows,
        image_size=arch.image.image_size,
        preprocess=arch.preprocess,
        context_length=arch.text.context_length,
        tokenize=make(arch.tokenize, tokenizer),
        augmentation=transforms.Augmentation(
            data.crop_scale, data.crop_ratio, data.flip, data.color_jitter, data.min_image_size, data.max_image_pixels
        ),
    )


def training_batches(pairs: TrainingPairs, *, num_threads: int, num_workers: int) -> grain.IterDataset[HostBatch]:
    """Returns this host's part of each global batch, read ahead by threads, in processes when there are workers.

    Threads and workers take chunks in turn, so that batches do not depend on how many there are.
    """
    chunks = grain.MapDataset.source(pairs).batch(CHUNK)
    read_ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    loaded = chunks.to_iter_dataset(read_ahead)
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's processes ask for it, also where there is no command line
        loaded = loaded.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), preemption.become_reader)
    return grain.experimental.RebatchIterDataset(loaded, len(pairs.rows))


def read(source: Source, index: int) -> Record:
    """Returns a record, with patience where storage does not answer at once.

    Raises:
        BadRecord: it is to be left out.
        OSError: storage does not answer in the end.
    """
    return storage.patiently(lambda: source[index])


def randomness(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Returns the record's own random stream in this epoch; a generator counts in the low words, so none overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, epoch, index]))


class EvaluationRows(NamedTuple):
    """This host's rows of a batch of what is evaluated."""

    image: UInt8[np.ndarray, "b H W C"]  # black where there is none
    records: list[Record | None]  # without their images, which are above; None: it is left out, or behind the last
    index: np.ndarray  # int64 [b], of the records in their source; -1: behind the last
    problem: np.ndarray  # uint8 [b], a `Problem`; NONE where there is a record


def evaluation_batches(
    source: Source,
    *,
    image_size: int,
    preprocess: Preprocess,
    global_batch: int,
    rows: Sequence[int] | None = None,
) -> Iterator[EvaluationRows]:
    """Yields this host's rows of every batch, in the order of the source; None: all of them, as a lone host has.

    The last batch is filled up. An image that cannot be read is a row with a problem, in its place.

    Raises:
        UserError: what a record says does not go with what its data set says.
    """
    rows = range(global_batch) if rows is None else rows
    nothing = np.zeros((image_size, image_size, 3), np.uint8)

    def load(position: int) -> tuple[UInt8[np.ndarray, "H W C"], Record | None, int, Problem]:
        batch, row = divmod(position, len(rows))
        index = batch * global_batch + rows[row]
        if index >= len(source):
            return nothing, None, -1, Problem.NONE
        try:
            record = read(source, index)
        except BadRecord as error:
            return nothing, None, index, error.problem
        except OSError:
            return nothing, None, index, Problem.UNREADABLE
        try:
            image = transforms.evaluation_crop(transforms.decode(record.image), image_size, preprocess)
        except (OSError, UserError):  # damaged, or of a shape or mode of which the model's preprocessing makes nothing
            return nothing, None, index, Problem.DAMAGED
        return image, record._replace(image=b""), index, Problem.NONE

    batches = -(-len(source) // global_batch)
    dataset = grain.MapDataset.range(batches * len(rows)).map(load)
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * len(rows))
    loaded = iter(dataset.to_iter_dataset(options))
    while part := list(itertools.islice(loaded, len(rows))):
        images, records, index, problems = zip(*part, strict=True)
        yield EvaluationRows(np.stack(images), list(records), np.int64(index), np.uint8(problems))
