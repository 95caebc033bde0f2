"""Runs that are cut off, and what is left of them."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from processes import finish, start

from clip_jax.files import AnyPath
from clip_jax.pretrained import read
from clip_jax.training.step_lines import read_lines

# What is measured, and differs from run to run.
MEASURED = ("pairs_per_second", "pairs_per_second_per_chip", "data_wait", "mfu", "device_memory")


# `train.py`, with a ResNet that is small enough.
TRAIN = """
import runpy
from clip_jax.architecture import Architecture, ResNetTower, TextTower
from clip_jax.models.variants import VARIANTS
image = ResNetTower(32, width=8, depths=(1, 2, 1, 1), num_heads=4)
VARIANTS["RN-small"] = Architecture(16, image, TextTower(16, 49408, width=32, depth=2, num_heads=2, mlp_dim=64))
runpy.run_path("train.py", run_name="__main__")
"""
# One process may use what was compiled before, which several may not (processes.py).
ALONE = {"JAX_ENABLE_COMPILATION_CACHE": "true", "XLA_FLAGS": os.environ["XLA_FLAGS"]}
SEVERAL = {"PJRT_NPROC": "8"}


def run(workdir: AnyPath, data_dir: Path, fields: dict[str, Any], *more: str, devices: int = 1) -> subprocess.Popen:
    """Starts a run of the quickstart's model on small batches, as a user would; `more` are further flags, of several
    processes."""
    fields = {"optim.warmup": 2, "data.global_batch": 16, "data.data_dir": data_dir} | fields
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    command = ["--config=configs/quickstart.py", f"--workdir={workdir}", *overrides, *more]
    environment = (SEVERAL if more else ALONE) | {"JAX_NUM_CPU_DEVICES": str(devices)}
    return start(["-c", TRAIN, *command], **environment)


def whole(workdir: Path, data_dir: Path, fields: dict[str, Any]) -> Path:
    """Returns the folder of a run that nothing has interrupted."""
    ((code, _, errors),) = finish([run(workdir, data_dir, fields)])
    assert code == 0, errors
    return workdir


def wait_for_lines(process: subprocess.Popen, workdir: AnyPath, lines: int, seconds: float = 300) -> None:
    """Returns once a run has logged so much, or has ended."""
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + seconds
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines) and process.poll() is None:
        assert time.monotonic() < deadline, f"no {lines} lines after {seconds} s"
        time.sleep(0.01)


def computed(workdir: AnyPath) -> list[dict]:
    """Returns the lines of a run's metrics without what the clock says."""
    lines = read_lines(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def identical(workdir: AnyPath, other: AnyPath) -> None:
    """Asserts that two runs have logged the same and have the same weights at their end, bit for bit."""
    assert computed(workdir) == computed(other)
    found, expected = (read(path) for path in (workdir, other))
    assert found.origin.rpartition("/")[2] == expected.origin.rpartition("/")[2]
    assert found.arrays.keys() == expected.arrays.keys()
    for path, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[path], array, err_msg=path, strict=True)
