"""Training here is training in OpenCLIP: from the same weights on the same batches come the same losses, weights and
statistics of batch norm, and the same accuracy on what was held out. tests/beside_open_clip.py has the two.
"""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from beside_open_clip import (
    ARCHITECTURES,
    BARS,
    STEPS,
    Start,
    Trained,
    apart,
    ends_by_rounding,
    in_another_order,
    ours,
    start,
    theirs,
)

from clip_jax.config import OptimConfig, Steps
from clip_jax.optim.schedules import schedule_of

FEW = 6  # steps of the test that always runs
TOWERS = pytest.mark.parametrize("tower", ARCHITECTURES)


@pytest.fixture(scope="module")
def begun(data_dir, tmp_path_factory) -> Callable[[str], Start]:
    """What both begin with, by the image tower; made when it is first asked for."""
    folder = tmp_path_factory.mktemp("weights")
    return functools.cache(lambda tower: start(tower, folder / tower, data_dir))


@pytest.fixture(scope="module")
def both(begun) -> Callable[[str, str], tuple[Trained, Trained]]:
    """Our training and theirs, by the image tower and the precision."""
    return functools.cache(lambda tower, dtype: (ours(begun(tower), dtype), theirs(begun(tower), dtype)))


@pytest.fixture(scope="module")
def reordered(begun) -> Callable[[str], list[Trained]]:
    """Our training in float32 with the rows of every batch in two other orders, by the image tower."""

    def train(tower: str) -> list[Trained]:
        given = begun(tower)
        return [ours(given, "float32", in_another_order(given.batches, seed)) for seed in (1, 2)]

    return functools.cache(train)


@pytest.fixture
def quickly_compiled() -> Iterator[None]:
    """What runs for a few steps need not be fast: compiling it takes half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_same_weights(found: dict, expected: dict, bar: float) -> None:
    """Checks parameters and statistics, each in relation to its largest element."""
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        error = np.abs(np.float64(found[path]) - x).max()
        assert error <= bar * np.abs(x).max(), f"{path}: {error}"


def test_the_first_steps_of_a_vit_have_open_clips_losses_rates_and_weights_in_float64(
    data_dir, tmp_path, quickly_compiled
):
    given = start("ViT", tmp_path / "weights", data_dir, steps=FEW)._replace(test=None)
    found, expected = ours(given, "float64"), theirs(given, "float64")
    np.testing.assert_allclose(found.rates, expected.rates, rtol=1e-12)
    assert len(found.losses) == FEW
    assert apart(found, expected).max() <= BARS["ViT", "float64"].loss
    assert_same_weights(found.weights, expected.weights, 1e-6)
    assert expected.losses[-1] < 0.99 * expected.losses[0], "nothing was trained"


@pytest.mark.full
@TOWERS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_loss_is_open_clips(tower, dtype, both):
    found, expected = both(tower, dtype)
    bar = BARS[tower, dtype]
    assert len(found.losses) == len(expected.losses) == STEPS
    assert apart(found, expected)[: bar.steps].max() <= bar.loss
    assert expected.final_loss < 0.6 * expected.losses[0], "nothing was trained"


@pytest.mark.full
@TOWERS
def test_weights_and_statistics_of_batch_norm_are_open_clips_in_float64_after_all_steps(tower, both):
    found, expected = both(tower, "float64")
    assert_same_weights(found.weights, expected.weights, 1e-6)
    counts = {int(n) for path, x in found.weights.items() if path.endswith("norm/count") for n in np.ravel(x)}
    assert counts == ({STEPS} if tower == "ResNet" else set())


@pytest.mark.full
@TOWERS
def test_final_loss_and_accuracy_in_float32_are_open_clips_within_what_rounding_changes(tower, both, reordered):
    found, expected = both(tower, "float32")
    loss, accuracy = ends_by_rounding([found, *reordered(tower)])
    assert loss.has(expected.final_loss), (loss, expected.final_loss)
    assert accuracy.has(expected.accuracy), (accuracy, expected.accuracy)
    assert loss.margin < 0.02 * loss.middle, "so wide an interval has everything"


@pytest.mark.full
@TOWERS
def test_accuracy_in_bfloat16_is_open_clips_within_a_point(tower, both):
    found, expected = both(tower, "bfloat16")
    assert abs(found.accuracy - expected.accuracy) <= 0.01
    assert expected.accuracy > 0.8, "nothing was learnt"


def test_rates_are_open_clips_at_every_step():
    cosine = pytest.importorskip("open_clip_train.scheduler").cosine_lr
    rate = schedule_of(OptimConfig(learning_rate=2e-3), Steps(100, 10))
    adjust = cosine(SimpleNamespace(param_groups=[{}]), 2e-3, 10, 100)
    found, expected = ([float(f(step)) for step in range(100)] for f in (rate, adjust))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
