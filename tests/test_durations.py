"""Durations as people write them, in steps."""

import pytest

from clip_jax import durations
from clip_jax.config import Config, DataConfig, OptimConfig, Steps
from clip_jax.errors import UserError


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("700", 700),
        ("700 steps", 700),
        ("1 step", 1),
        ("10_000steps", 10_000),
        ("10,000 steps", 10_000),
        ("2.5k steps", 2500),
        ("12.8B examples", 100_000_000),
        ("129 examples", 2),  # the second step is not full of them
        ("0.5 epochs", 500),
        ("32 epochs", 32_000),
        (".001 epochs", 1),
        ("0", 0),
    ],
)
def test_steps_examples_and_epochs_are_so_many_steps(written, expected):
    assert durations.steps(written, "duration", global_batch=128, records=128_000) == expected


@pytest.mark.parametrize("written", ["", "steps", "-1", "1e3", "3 weeks", "5 K steps", "1 2", "nan", "1.2.3 epochs"])
def test_what_is_no_duration_is_refused_with_the_field_and_how_to_write_it(written):
    with pytest.raises(UserError, match=r"optim.warmup=.* is no duration: write it as '5000 steps'") as error:
        durations.parse(written, "optim.warmup")
    assert repr(written) in str(error.value)


def test_a_run_of_epochs_is_as_long_as_its_data():
    config = Config(data=DataConfig(global_batch=10), duration="2 epochs", optim=OptimConfig(warmup="100 examples"))
    assert config.steps(records=1001) == Steps(total=201, warmup=10)
    with pytest.raises(UserError, match=r"duration='2 epochs': the length of an epoch"):
        config.steps(records=None)
    with pytest.raises(UserError, match=r"optim.warmup='100 examples' \(10 steps\) leaves nothing of duration='2 epo"):
        config.steps(records=50)
