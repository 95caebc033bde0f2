"""The same global batches, record for record and pixel for pixel: for any number of hosts, threads and workers, and
after a resume on another number of hosts."""

import dataclasses

import numpy as np
import pytest
import shards

from clip_jax import tokenizer
from clip_jax.architecture import Preprocess
from clip_jax.data.pipeline import HostBatch, Order, TrainingPairs, training_batches
from clip_jax.data.sources import open_source
from clip_jax.data.transforms import Augmentation

GLOBAL, STEPS = 8, 100
Rows = tuple[np.ndarray, ...]  # index, tokens and image of all rows of all batches, in their order


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> TrainingPairs:
    """A hundred global batches of 210 records in three shards: almost four epochs."""
    source = open_source(f"wds:{shards.write_several(tmp_path_factory.mktemp('shards'), shards=3, records=70)}")
    return TrainingPairs(
        source=source,
        order=Order.of(source, 5),
        first=0,
        last=STEPS * GLOBAL,
        global_batch=GLOBAL,
        rows=range(GLOBAL),
        image_size=8,
        preprocess=Preprocess(),
        context_length=10,
        tokenize=tokenizer.tokenize,
        augmentation=Augmentation((0.3, 1.0), (0.7, 1.4), flip=True, color_jitter=(0.2, 0.2, 0.2, 0.1)),
    )


def leaves(loaded: HostBatch) -> Rows:
    assert loaded.batch.valid.all()
    return loaded.index, loaded.batch.tokens, loaded.batch.image


@pytest.fixture(scope="module")
def expected(pairs) -> Rows:
    """One pair after the other."""
    return tuple(map(np.stack, zip(*(leaves(pairs[i]) for i in range(len(pairs))), strict=True)))


def read(pairs: TrainingPairs, *, hosts: int, workers: int, first: int = 0) -> Rows:
    """Returns the rows from batch `first` on as several hosts read them."""
    share = GLOBAL // hosts
    rows = [range(host * share, (host + 1) * share) for host in range(hosts)]
    parts = [dataclasses.replace(pairs, rows=some, first=first * GLOBAL) for some in rows]
    read = [map(leaves, training_batches(part, num_threads=2, num_workers=workers)) for part in parts]
    every = [part for step in zip(*read, strict=True) for part in step]
    return tuple(map(np.concatenate, zip(*every, strict=True)))


# What starts many processes runs with all other combinations under `full`.
@pytest.mark.parametrize(
    ("hosts", "workers"),
    [(1, 0), (2, 0), (4, 0), (1, 4), (2, 1)]
    + [pytest.param(*case, marks=pytest.mark.full) for case in [(1, 1), (2, 4), (4, 1), (4, 4)]],
)
def test_batches_0_to_99_do_not_depend_on_hosts_and_workers(pairs, expected, hosts, workers):
    for found, wanted in zip(read(pairs, hosts=hosts, workers=workers), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("hosts", "workers"), [(2, 0), (4, 0), pytest.param(2, 1, marks=pytest.mark.full)])
def test_a_run_resumed_at_37_on_other_hosts_goes_on_with_the_same(pairs, expected, hosts, workers):
    for found, wanted in zip(read(pairs, hosts=hosts, workers=workers, first=37), expected, strict=True):
        np.testing.assert_array_equal(found, wanted[37 * GLOBAL :])


def test_one_epoch_has_every_record_once_and_the_next_in_another_order(expected):
    index = expected[0]
    epochs = [index[start : start + 210].tolist() for start in (0, 210, 420)]
    assert all(sorted(epoch) == list(range(210)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(pixels.ravel()) for pixels in expected[2][:630]}) == 630, "every time cropped anew"


def test_every_image_goes_with_its_own_caption(pairs, expected):
    for row, (index, tokens) in enumerate(zip(*expected[:2], strict=True)):
        np.testing.assert_array_equal(tokens, tokenizer.tokenize(f"number {index}", 10)[0])
        assert pairs.caption(row) == f"number {index}"
        assert pairs.source[int(index)].image == shards.picture(int(index))
