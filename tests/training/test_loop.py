"""A whole run: the same on any mesh, the same when killed and started again, refused when it is another."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import clip_jax
from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from clip_jax.errors import UserError
from clip_jax.training.loop import train
from clip_jax.training.step_lines import read_lines

ROOT = Path(__file__).parents[2]
ACCURACIES = {"image_to_text_accuracy", "text_to_image_accuracy"}


def small_config(data_dir: Path, **changes) -> Config:
    return Config(
        model=ModelConfig(variant="ViT-W64/4@16px"),
        data=DataConfig(train="tfds:captioned_digits:train", data_dir=str(data_dir), global_batch=32),
        optim=OptimConfig(learning_rate=1e-3, warmup="2 steps"),
        **({"duration": "20 steps", "log_every": 1, "checkpoint_every": 100} | changes),
    )


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def on_one_device(data_dir, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("one")
    train(small_config(data_dir), workdir, devices=jax.devices()[:1])
    return workdir


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 8, 1)])
def test_20_steps_on_8_devices_give_the_losses_of_one(sizes, on_one_device, data_dir, tmp_path):
    train(small_config(data_dir, mesh=MeshConfig(*sizes)), tmp_path)
    one, eight = losses(on_one_device), losses(tmp_path)
    assert [step for step, _ in eight] == list(range(1, 21))
    for (_, expected), (_, found) in zip(one, eight, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    first, other = (read_lines(folder / "metrics.jsonl")[0] for folder in (on_one_device, tmp_path))
    for name in (name for name in first if "norm" in name or "accuracy" in name):
        assert other[name] == pytest.approx(first[name], rel=1e-4)


def test_metrics_hold_what_was_promised_and_the_loss_falls(on_one_device):
    lines = read_lines(on_one_device / "metrics.jsonl")
    norms = {f"{of}_norm{part}" for of in ("gradient", "parameter") for part in ("", "_image", "_text")}
    rates = {"pairs_per_second", "pairs_per_second_per_chip", "data_wait"}
    others = {"step", "loss", "logit_scale", "learning_rate", "valid", "skipped"}
    assert lines[0].keys() == norms | rates | ACCURACIES | others
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["loss"] == pytest.approx(3.466, abs=0.5)  # ln 32
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["learning_rate"] < lines[2]["learning_rate"] == pytest.approx(1e-3)
    assert list((on_one_device / "tensorboard").glob("events.*"))


def start(workdir: Path, data_dir: Path) -> subprocess.Popen:
    """Starts a run of 12 steps with checkpoints at 4, 8 and 12, as a user would."""
    fields = {
        "duration": 12,
        "log_every": 1,
        "checkpoint_every": 4,
        "optim.warmup": 2,
        "data.global_batch": 16,
        "data.data_dir": data_dir,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return subprocess.Popen(
        [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", *overrides],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


@pytest.mark.full
def test_a_run_killed_between_two_checkpoints_and_started_again_is_the_uninterrupted_run(data_dir, tmp_path):
    finish(start(tmp_path / "whole", data_dir))

    cut = tmp_path / "cut"
    process = start(cut, data_dir)
    metrics = cut / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 6 and (cut / "checkpoints" / "4").exists()):
        assert time.monotonic() < deadline, "the run did not get to step 6"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = len(read_lines(metrics))
    assert 6 <= killed_at < 12, "killed too late to show anything"

    assert "resumed at step" in finish(start(cut, data_dir))
    assert losses(cut) == losses(tmp_path / "whole")
    assert [step for step, _ in losses(cut)] == list(range(1, 13))


def test_a_finished_run_started_again_changes_nothing(on_one_device, data_dir):
    before = losses(on_one_device)
    train(small_config(data_dir), on_one_device, devices=jax.devices()[:1])
    assert losses(on_one_device) == before


@pytest.mark.full
def test_the_sigmoid_loss_trains_a_bias_in_either_form_and_on_the_batch_whole_or_in_parts(data_dir, tmp_path):
    config = small_config(data_dir, duration="6 steps")
    config.model.logit_bias, config.model.patch_dropout = True, 0.5
    config.data.global_batch = 16
    train(config, tmp_path / "dense", devices=jax.devices()[:1])
    config.loss.form, config.microbatch = "ring", 8
    train(config, tmp_path / "ring")
    dense, ring = losses(tmp_path / "dense"), losses(tmp_path / "ring")
    assert dense[0][1] == pytest.approx(10, abs=3)  # pairs cost softplus(10 - 10 cos), others next to nothing
    assert dense[-1][1] < dense[0][1]
    for (_, expected), (_, found) in zip(dense, ring, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    bias = clip_jax.load(tmp_path / "ring")[0].weights.params["logit_bias"]
    lines = read_lines(tmp_path / "ring" / "metrics.jsonl")
    assert [lines[0]["logit_bias"], bias] == [-10, pytest.approx(lines[-1]["logit_bias"], abs=2e-3)]
    assert bias != -10


def test_a_workdir_of_another_config_is_refused_by_the_fields_that_differ(on_one_device, data_dir):
    other = small_config(data_dir, seed=1, mesh=MeshConfig(data=1))
    other.optim.learning_rate = 5e-4
    before = (on_one_device / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"optim.learning_rate: 0.001 -> 0.0005; seed: 0 -> 1") as error:
        train(other, on_one_device, devices=jax.devices()[:1])
    changed, free = str(error.value).split("What may change when a run goes on:")
    assert "mesh" not in changed
    assert "mesh" in free
    assert (on_one_device / "config.json").read_bytes() == before


def test_a_changed_data_set_is_refused_with_the_difference(on_one_device, data_dir, monkeypatch):
    from clip_jax.data.sources.tfds import TfdsSource

    genuine = TfdsSource.fingerprint
    monkeypatch.setattr(TfdsSource, "fingerprint", lambda self: genuine(self) | {"version": "9.9.9"})
    with pytest.raises(UserError, match=r'data/version: "[\d.]+" -> "9\.9\.9"\); .*accept_changes=true'):
        train(small_config(data_dir), on_one_device, devices=jax.devices()[:1])


def test_the_config_file_of_a_run_rebuilds_it(on_one_device, data_dir):
    from clip_jax.models.variants import VARIANTS
    from clip_jax.workdir import Workdir

    folder = Workdir(on_one_device)
    assert folder.config() == small_config(data_dir)
    assert folder.architecture() == VARIANTS["ViT-W64/4@16px"]
    assert json.loads((on_one_device / "config.json").read_text())["config"]["optim"]["b2"] == 0.98
