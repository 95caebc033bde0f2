"""The learning rate at every step, with its corners, against NumPy."""

import dataclasses

import jax
import numpy as np
import pytest

from clip_jax.config import SCHEDULES, Config, DataConfig, OptimConfig, Steps
from clip_jax.optim.schedules import schedule_of

TOTAL = 110


def rates(schedule: str, steps: Steps) -> np.ndarray:
    rate = jax.jit(schedule_of(OptimConfig(learning_rate=2e-3, schedule=schedule), steps))
    return np.array([rate(step) for step in range(TOTAL + 1)])


CURVES = {
    "cosine": lambda step, warmup: (1 + np.cos(np.pi * (step - warmup) / (TOTAL - warmup))) / 2,
    "linear": lambda step, warmup: (TOTAL - step) / (TOTAL - warmup),
    "rsqrt": lambda step, warmup: 1 / np.sqrt(1 + (step - warmup) / warmup),  # big_vision's, by its warm-up
    "constant": lambda step, warmup: 1.0,
}


@pytest.mark.parametrize(
    ("schedule", "warmup"),
    [(name, warmup) for name in SCHEDULES for warmup in (0, 1, 10, TOTAL - 1) if warmup or name != "rsqrt"],
)
def test_the_rate_is_a_line_then_the_curve(schedule, warmup):
    found = rates(schedule, Steps(TOTAL, warmup))
    expected = [
        2e-3 * ((step + 1) / warmup if step < warmup else CURVES[schedule](step, warmup)) for step in range(TOTAL)
    ]
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-5, atol=1e-9)  # of a cosine near its end
    assert found[warmup] == np.float32(2e-3)
    assert found[0] == pytest.approx(2e-3 / max(warmup, 1))
    assert found[-1] == 0


@pytest.mark.parametrize("cooldown", [1, 20, 100])
@pytest.mark.parametrize("schedule", ["rsqrt", "constant"])
def test_a_cooldown_is_a_line_to_0_that_the_curve_is_multiplied_with(schedule, cooldown):
    without, found = (rates(schedule, Steps(TOTAL, 10, n)) for n in (0, cooldown))
    begins = TOTAL - cooldown
    np.testing.assert_array_equal(found[: begins + 1], without[: begins + 1])
    left = TOTAL - np.arange(begins, TOTAL)
    np.testing.assert_allclose(found[begins:-1], without[begins:-1] * left / cooldown, rtol=1e-6)
    assert found[-1] == 0


def test_durations_of_any_unit_are_a_schedules():
    written = OptimConfig(schedule="rsqrt", warmup="100 examples", cooldown="0.5 epochs")
    config = Config(data=DataConfig(global_batch=10), duration="2 epochs", optim=written)
    assert config.steps(records=1000) == Steps(total=200, warmup=10, cooldown=50)
    with pytest.raises(ValueError, match=r"optim.cooldown='0.5 epochs': the length of an epoch"):
        dataclasses.replace(config, duration="10 steps").steps(None)
