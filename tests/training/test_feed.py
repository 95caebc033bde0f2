"""The feed of a run: batches are ready before they are asked for, waiting is measured and something done about it."""

import dataclasses
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shards

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from clip_jax.data.pipeline import TrainingPairs, training_pairs
from clip_jax.data.sources import open_training_source
from clip_jax.models.variants import architecture
from clip_jax.sharding import make_mesh
from clip_jax.training.feed import Feed, in_words, loggable, merged
from clip_jax.training.metrics import StepClock

STEPS = 12
MESH = make_mesh(MeshConfig(data=2), jax.devices()[:2])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = shards.write_several(tmp_path_factory.mktemp("shards"), shards=2, records=20)
    data = DataConfig(train=f"wds:{folder}", global_batch=8)
    model = ModelConfig(variant="ViT-W64/4@16px")
    return Config(model, data, duration=f"{STEPS} steps", optim=dataclasses.replace(Config().optim, warmup="1 step"))


@pytest.fixture(scope="module")
def pairs(config) -> TrainingPairs:
    source = open_training_source(config.data)
    return training_pairs(config, architecture(config.model), None, source, rows=range(8))


def test_batches_come_on_the_mesh_in_order_and_end_with_the_run(config, pairs):
    with Feed(pairs, MESH, config.data, cores=0) as feed:
        for step in range(STEPS):
            batch = next(feed)
            assert {shard.data.shape[0] for shard in batch.image.addressable_shards} == {4}
            expected = [pairs[8 * step + row].batch for row in range(8)]
            np.testing.assert_array_equal(batch.image, [pair.image for pair in expected])
            np.testing.assert_array_equal(batch.tokens, [pair.tokens for pair in expected])
        with pytest.raises(StopIteration):
            next(feed)


def test_a_batch_is_on_its_way_before_it_is_asked_for(config, pairs, monkeypatch):
    read = []
    genuine = TrainingPairs.__getitem__
    monkeypatch.setattr(TrainingPairs, "__getitem__", lambda self, i: read.append(i) or genuine(self, i))
    with Feed(pairs, MESH, config.data, cores=0) as feed:
        next(feed)
        deadline = time.monotonic() + 30
        while len(read) < 24 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(read) >= 24


# --- waiting ---


@pytest.fixture(scope="module")
def step() -> tuple[Callable[[], jax.Array], float]:
    """Returns what begins a step and returns its result before it is done, and how many seconds it takes."""
    run = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ x), x).sum())
    x = jnp.full((600, 600), 0.01)
    run(x).block_until_ready()
    started = time.monotonic()
    run(x).block_until_ready()
    return lambda: run(x), time.monotonic() - started


def waited(step: tuple[Callable[[], jax.Array], float], data: float) -> float:
    """Returns the share of the time that steps wait, where data takes so many times as long as a step."""
    begin, seconds = step
    with StepClock(10) as clock:
        clock.lap()
        for _ in range(4):
            clock.dispatched(begin())
            with clock.waiting_for_data():
                time.sleep(data * seconds)
        return clock.lap()["data_wait"]


def test_data_that_comes_while_the_devices_compute_is_not_waited_for(step):
    assert waited(step, 0.3) < 0.1


def test_devices_that_are_idle_wait(step):
    assert waited(step, 4) == pytest.approx(0.75, abs=0.15)


def test_a_lap_counts_the_pairs_of_its_steps(step):
    begin, seconds = step
    with StepClock(10) as clock:
        clock.lap()
        for _ in range(4):
            clock.dispatched(begin())
        assert clock.lap()["pairs_per_second"] == pytest.approx(10 / seconds, rel=0.7)


def test_who_waits_is_told_once_what_to_raise(config, pairs):
    said = []
    with Feed(pairs, MESH, dataclasses.replace(config.data, num_workers=0), cores=8) as feed:
        for share in (0.9, 0.05, 0.43, 0.5):  # the first is that of the start
            feed.report(share, said.append)
    assert len(said) == 1
    assert (
        "steps wait 43% of their time for data: raise data.num_workers (now 0) or data.num_threads (now 2)" in said[0]
    )


def test_workers_are_added_until_nothing_waits_and_batches_stay_the_same(config, pairs):
    said, found = [], []
    with Feed(pairs, MESH, config.data, cores=2) as feed:
        for step, share in zip(range(STEPS), itertools.chain([0.9, 0.3], itertools.repeat(0.0)), strict=False):
            found.append(np.asarray(next(feed).image))
            assert feed.report(share, said.append) == (share, {})
            assert len(said) == (step >= 1)
    assert said == ["steps wait 30% of their time for data: data is read by 2 worker processes from now on"]
    expected = [[pairs[8 * step + row].batch.image for row in range(8)] for step in range(STEPS)]
    np.testing.assert_array_equal(found, expected)


# --- what is said of bad records ---


def test_what_several_processes_could_not_read_is_put_together_the_worst_shard_first():
    one = {"a.tar": {"no caption": 2}, "b.tar": {"damaged image": 1}}
    other = {"b.tar": {"damaged image": 3, "no caption": 1}}
    together = merged([one, other])
    assert list(together.items()) == [("b.tar", {"damaged image": 4, "no caption": 1}), ("a.tar", {"no caption": 2})]
    assert in_words(together) == "7 pairs: damaged image 4, no caption 3; in b.tar (5), a.tar (2)"
    assert in_words({f"{i}": {"x": 1} for i in range(9)}) == "9 pairs: x 9; in 0 (1), 1 (1), 2 (1), 3 (1), 4 (1) …"


def test_a_line_of_metrics_names_a_hundred_shards_and_counts_all():
    bad = {f"{i:05}.tar": {"damaged image": 1000 - i} for i in range(300)}
    assert loggable({}) == {}
    line = loggable(merged([bad]))["bad_records"]
    assert len(line) == 101
    assert sum(sum(reasons.values()) for reasons in line.values()) == sum(range(701, 1001))
