"""The order of the data, and the batches that come of it.

The order is a pure function of (seed, examples seen): to resume is to start at another number, on any number of hosts.
What is random about a record is a function of (seed, epoch, index): the same pixels whoever reads it.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from clip_jax.architecture import Preprocess
from clip_jax.data import transforms
from clip_jax.data.sources import Record, Source
from clip_jax.errors import UserError
from clip_jax.tokenizer import Tokenizer
from clip_jax.typing import Batch, UInt8


@dataclasses.dataclass(frozen=True)
class Order:
    """An endless, shuffled pass over `length` records: every epoch has each once, in an order of its own."""

    length: int
    seed: int

    def __post_init__(self):
        shuffled = grain.MapDataset.range(self.length).seed(self.seed).shuffle().repeat()
        object.__setattr__(self, "_shuffled", shuffled)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns (epoch, index) of the example at a position, which counts the examples of all hosts."""
        return position // self.length, int(self._shuffled[position])


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
    crop_scale: tuple[float, float]

    def __len__(self) -> int:
        return (self.last - self.first) // self.global_batch * len(self.rows)

    def __getitem__(self, i: int) -> Batch:
        step, row = divmod(i, len(self.rows))
        epoch, index = self.order[self.first + step * self.global_batch + self.rows[row]]
        random = randomness(self.order.seed, epoch, index)
        record = self.source[index]
        caption = record.captions[random.integers(len(record.captions))]
        try:
            image = transforms.decode(record.image)
            pixels = transforms.random_crop(
                image, self.image_size, self.preprocess, scale=self.crop_scale, random=random
            )
            valid = True
        except OSError as error:
            warnings.warn(f"left out image {index} of {self.source.name}:{self.source.split}: {error}", stacklevel=2)
            pixels, valid = np.zeros((self.image_size, self.image_size, 3), np.uint8), False
        return Batch(pixels, self.tokenize(caption, self.context_length, True)[0], np.bool_(valid))


def training_batches(pairs: TrainingPairs, *, num_threads: int, num_workers: int) -> Iterator[Batch]:
    """Yields this host's part of each global batch, read ahead by threads, in processes when there are workers."""
    dataset = grain.MapDataset.source(pairs).batch(len(pairs.rows))
    read_ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    batches = dataset.to_iter_dataset(read_ahead)
    if num_workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(batches)


def randomness(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Returns the record's own random stream in this epoch; a generator counts in the low words, so none overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, epoch, index]))


def evaluation_batches(
    source: Source, *, image_size: int, preprocess: Preprocess, batch: int, num_threads: int = 2
) -> Iterator[tuple[UInt8[np.ndarray, "b H W C"], list[Record]]]:
    """Yields (images, records) in the order of the source, `batch` at a time; the last may be fewer.

    Raises:
        UserError: an image that cannot be read.
    """

    def load(index: int) -> tuple[UInt8[np.ndarray, "H W C"], Record]:
        record = source[index]
        try:
            return transforms.evaluation_crop(transforms.decode(record.image), image_size, preprocess), record
        except (OSError, UserError) as error:
            raise UserError(f"image {index} of {source.name}:{source.split} cannot be read: {error}") from error

    dataset = grain.MapDataset.range(len(source)).map(load)
    loaded = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * batch)))
    while part := list(itertools.islice(loaded, batch)):
        yield np.stack([image for image, _ in part]), [record for _, record in part]
