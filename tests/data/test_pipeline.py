"""The order of the data, and batches that do not depend on who reads them, on how many hosts, or from where on."""

import dataclasses
import io
import itertools
import pickle

import numpy as np
import pytest
from in_memory import InMemory
from PIL import Image
from tiny_tokenizers import BOS, EOS, PAD, few_words

from clip_jax import tokenizer
from clip_jax.architecture import Preprocess, Tokenize
from clip_jax.data.pipeline import (
    EvaluationRows,
    HostBatch,
    Order,
    TrainingPairs,
    evaluation_batches,
    randomness,
    training_batches,
)
from clip_jax.data.problems import Problem
from clip_jax.data.sources import Record, open_source
from clip_jax.data.transforms import Augmentation, training_crop
from clip_jax.typing import Batch

GLOBAL = 8  # pairs a batch


@dataclasses.dataclass(frozen=True)
class Memory(InMemory):
    """A source of noise, every image apart; those in `damaged` cannot be decoded."""

    length: int
    damaged: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (12, 9, 3), np.uint8)).save(file, "PNG")
        image = file.getvalue()[:60] if index in self.damaged else file.getvalue()
        return Record(image, (f"number {index}", f"a picture of {index}", f"{index}"), None)


def pairs_of(source, *, seed: int = 0, rows=range(GLOBAL), first: int = 0, steps: int = 7) -> TrainingPairs:
    """Returns what a host reads from batch `first` to batch `steps`: with 20 records, almost three epochs."""
    return TrainingPairs(
        source=source,
        order=Order.of(source, seed),
        first=first * GLOBAL,
        last=steps * GLOBAL,
        global_batch=GLOBAL,
        rows=rows,
        image_size=8,
        preprocess=Preprocess(),
        context_length=10,
        tokenize=tokenizer.tokenize,
        augmentation=Augmentation((0.3, 1.0)),
    )


def read(pairs: TrainingPairs, *, threads: int = 2, workers: int = 0) -> list[Batch]:
    loaded = list(training_batches(pairs, num_threads=threads, num_workers=workers))
    assert all(isinstance(host, HostBatch) for host in loaded)
    return [host.batch for host in loaded]


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, Batch)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype


# --- the order ---


def indices(seed: int, epoch: int, length: int = 101) -> list[int]:
    order = Order((length,), seed)
    found = [order[position] for position in range(epoch * length, (epoch + 1) * length)]
    assert {e for e, _ in found} == {epoch}
    return [index for _, index in found]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("epoch", [0, 1, 50])
def test_every_epoch_has_every_record_once(seed, epoch):
    assert sorted(indices(seed, epoch)) == list(range(101))


def test_no_two_epochs_and_no_two_seeds_have_the_same_order():
    orders = [tuple(indices(seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    # By chance, two orders of n records agree in one place on average, Poisson.
    assert max(np.sum(np.equal(a, b)) for a, b in itertools.combinations(orders, 2)) < 8


def test_the_order_is_a_function_of_seed_and_position_however_it_is_asked():
    order = Order((101,), 5)
    forwards = [order[i] for i in range(303)]
    assert [Order((101,), 5)[i] for i in reversed(range(303))] == forwards[::-1]
    assert [pickle.loads(pickle.dumps(order))[i] for i in range(303)] == forwards


def test_the_random_stream_of_a_record_is_its_own():
    keys = list(itertools.product((0, 1), (0, 1, 2), (0, 1, 2)))
    streams = {randomness(*key).bytes(64) for key in keys}
    assert len(streams) == len(keys)
    assert randomness(1, 2, 0).bytes(64) == randomness(1, 2, 0).bytes(64)


# --- batches ---


@pytest.fixture(scope="module")
def expected() -> list[Batch]:
    """Seven global batches of 20 records, one pair after the other."""
    pairs = pairs_of(Memory(20))
    assert len(pairs) == 7 * GLOBAL
    return [
        Batch(*map(np.stack, zip(*(pairs[j].batch for j in range(i, i + GLOBAL)), strict=True)))
        for i in range(0, 56, 8)
    ]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_are_the_pairs_in_their_order_however_many_threads_read(threads, expected):
    found = read(pairs_of(Memory(20)), threads=threads)
    assert_equal(found, expected)
    batch = found[0]
    assert (batch.image.shape, batch.image.dtype) == ((GLOBAL, 8, 8, 3), np.uint8)
    assert (batch.tokens.shape, batch.tokens.dtype) == ((GLOBAL, 10), np.int32)
    assert (batch.valid.shape, batch.valid.dtype) == ((GLOBAL,), bool)
    assert batch.valid.all()


@pytest.mark.parametrize(
    "hosts",
    [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 6, 7], [2, 3, 4, 5]]],
    ids=["2 hosts", "4 hosts", "2 hosts, interleaved"],
)
def test_the_hosts_together_read_the_batch_of_one(hosts, expected):
    parts = [read(pairs_of(Memory(20), rows=rows)) for rows in hosts]
    places = np.argsort([row for rows in hosts for row in rows])
    together = [
        Batch(*(np.concatenate(x)[places] for x in zip(*batch, strict=True))) for batch in zip(*parts, strict=True)
    ]
    assert_equal(together, expected)


@pytest.mark.parametrize("first", [1, 3, 6, 7])
def test_a_resumed_run_reads_what_the_uninterrupted_one_would(first, expected):
    assert_equal(read(pairs_of(Memory(20), first=first)), expected[first:])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_read_the_same_also_after_a_resume(workers, data_dir):
    source = open_source("tfds:captioned_digits", data_dir=str(data_dir))
    pairs = pairs_of(source, rows=[4, 5, 6, 7], first=2, steps=5)
    assert_equal(read(pairs, workers=workers), read(pairs))


def test_worker_processes_tokenize_by_a_file(data_dir):
    source = open_source("tfds:captioned_digits", data_dir=str(data_dir))
    by_file = tokenizer.make(Tokenize("file", clean="lower", pad_id=PAD), few_words())
    pairs = dataclasses.replace(pairs_of(source, steps=2), tokenize=by_file)
    batches = read(pairs, workers=1)
    assert_equal(batches, read(pairs))
    assert all((tokens == EOS).sum() == 1 and tokens[0] == BOS for batch in batches for tokens in batch.tokens)
    assert len({tuple(tokens) for batch in batches for tokens in batch.tokens.tolist()}) > 3


def test_tokens_are_those_of_one_of_the_records_captions_and_every_caption_has_its_turn():
    source, pairs = Memory(20), pairs_of(Memory(20), steps=60)
    chosen = set()
    for i in range(len(pairs)):
        _, index = pairs.order[i]
        rows = [tokenizer.tokenize(caption, 10)[0].tolist() for caption in source[index].captions]
        chosen.add((index, rows.index(pairs[i].batch.tokens.tolist())))
    assert len(chosen) == 20 * 3


def test_a_record_is_cropped_anew_in_every_epoch():
    pairs = pairs_of(Memory(20), steps=5)
    by_record = {}
    for i in range(40):
        epoch, index = pairs.order[i]
        by_record.setdefault(index, {})[epoch] = pairs[i].batch.image
    assert all((crops[0] != crops[1]).any() for crops in by_record.values())


# --- what cannot be read ---


def test_a_record_that_cannot_be_read_is_an_empty_pair_that_is_not_valid_and_all_others_stay(expected):
    damaged = (3, 17)
    found = list(training_batches(pairs_of(Memory(20, damaged)), num_threads=2, num_workers=0))
    order = Order((20,), 0)
    for i, (host, whole) in enumerate(zip(found, expected, strict=True)):
        indices = [order[i * GLOBAL + row][1] for row in range(GLOBAL)]
        bad = np.isin(indices, damaged)
        np.testing.assert_array_equal(host.index, indices)
        np.testing.assert_array_equal(host.problem, np.where(bad, Problem.DAMAGED, Problem.NONE))
        np.testing.assert_array_equal(host.batch.valid, ~bad)
        np.testing.assert_array_equal(host.batch.tokens, np.where(bad[:, None], 0, whole.tokens))
        np.testing.assert_array_equal(host.batch.image, np.where(bad[:, None, None, None], 0, whole.image))


def test_training_crops_as_the_models_preprocessing_says():
    source, way = Memory(20), Preprocess(interpolation="bilinear")
    pairs = dataclasses.replace(pairs_of(source), preprocess=way)
    for i in range(5):
        epoch, index = pairs.order[i]
        random = randomness(pairs.order.seed, epoch, index)
        random.integers(3)  # the caption
        expected = training_crop(source[index].image, 8, way, pairs.augmentation, random)
        np.testing.assert_array_equal(pairs[i].batch.image, expected)
        assert (pairs[i].batch.image != pairs_of(source)[i].batch.image).any()


# --- evaluation ---


def evaluated(source, **options) -> list[EvaluationRows]:
    return list(evaluation_batches(source, image_size=8, preprocess=Preprocess(), **options))


def test_evaluation_reads_every_record_once_in_order_and_fills_up_the_last_batch():
    source = Memory(10)
    batches = evaluated(source, global_batch=4)
    assert [rows.image.shape for rows in batches] == [(4, 8, 8, 3)] * 3
    assert [i for rows in batches for i in rows.index] == [*range(10), -1, -1]
    records = [record for rows in batches for record in rows.records]
    assert records == [source[i]._replace(image=b"") for i in range(10)] + [None, None]
    assert [image.any() for rows in batches for image in rows.image] == [True] * 10 + [False] * 2
    assert not np.concatenate([rows.problem for rows in batches]).any()


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_evaluation_does_not_depend_on_the_batch_or_on_who_reads_it(batch):
    [reference] = evaluated(Memory(10), global_batch=10)
    found = evaluated(Memory(10), global_batch=batch)
    np.testing.assert_array_equal(np.concatenate([rows.image for rows in found])[:10], reference.image)
    mine = range(0, batch, 2)
    hosts = evaluated(Memory(10), global_batch=batch, rows=mine)
    for host, whole in zip(hosts, found, strict=True):
        assert host.records == [whole.records[row] for row in mine]
        for part, of in ((host.image, whole.image), (host.index, whole.index), (host.problem, whole.problem)):
            np.testing.assert_array_equal(part, of[list(mine)])


def test_an_image_that_cannot_be_read_is_a_row_with_a_problem():
    [rows] = evaluated(Memory(10, damaged=(6,)), global_batch=10)
    assert rows.records[6] is None
    assert not rows.image[6].any()
    assert rows.problem.tolist() == [Problem.DAMAGED if i == 6 else 0 for i in range(10)]
    assert rows.index.tolist() == list(range(10))
