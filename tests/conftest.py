"""What all tests share: eight simulated devices, one folder of data sets, float64 on request."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start, too

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A TFDS folder; an embedded data set is made in it by the first test that opens it."""
    return tmp_path_factory.mktemp("data_sets")


@pytest.fixture
def x64() -> Iterator[None]:
    """Lets arrays be float64, where equality is proven: nothing hides behind rounding."""
    with jax.enable_x64(True):
        yield
