"""Weights & Biases: the real one, offline; and what is said where it cannot be used."""

import importlib.machinery
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clip_jax.config import Config
from clip_jax.errors import UserError
from clip_jax.training.sinks import check_wandb
from clip_jax.training.step_lines import read_lines

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # should anything try to send


def records(path: Path) -> Iterator[Any]:
    """Yields the records of an offline run: a log as LevelDB has it, blocks of 32 KiB, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last of several
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def contents(path: Path) -> tuple[Any, list[dict[str, float]]]:
    """Returns an offline run's head and the lines of its history."""
    head, lines = None, []
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            head = record.run
        elif record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            lines.append({key: value for key, value in items.items() if not key.startswith("_")})
    return head, lines


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return kept | {"HOME": str(home), "JAX_PLATFORMS": "cpu", "WANDB_BASE_URL": NOWHERE} | more


def train(workdir: Path, data_dir: Path, home: Path) -> str:
    fields = {
        "duration": "3 steps",
        "log_every": 1,
        "checkpoint_every": 2,
        "optim.warmup": "1 step",
        "data.global_batch": 16,
        "data.data_dir": data_dir,
        "wandb": "clip",
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", *overrides]
    env = environment(home, WANDB_MODE="offline")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.full
def test_a_run_and_the_run_that_goes_on_are_one_in_weights_and_biases_with_the_lines_of_metrics_jsonl(
    data_dir, tmp_path
):
    workdir = tmp_path / "a run [v2]"
    assert "`wandb sync " in train(workdir, data_dir, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "3")  # as if it had been killed before
    assert "resumed at step 2" in train(workdir, data_dir, tmp_path)

    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    first, second = map(contents, files)
    assert first[0].run_id == second[0].run_id == (workdir / "wandb" / "id").read_text().strip()
    assert (first[0].project, first[0].display_name) == ("clip", "a run [v2]")
    config = {item.key: json.loads(item.value_json) for item in first[0].config.update}
    assert config["data"]["global_batch"] == 16
    lines = [line | {"bad_records": 0} for line in read_lines(workdir / "metrics.jsonl")]
    assert first[1][:2] + second[1] == lines
    assert [line["loss"] for line in first[1]] == [line["loss"] for line in lines]


def test_without_a_key_and_a_terminal_the_next_moves_are_named(tmp_path):
    code = "from clip_jax import config; from clip_jax.training import sinks; "
    command = [sys.executable, "-c", code + "sinks.check_wandb(config.Config(wandb='clip'))"]
    env, closed = environment(tmp_path), subprocess.DEVNULL
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=closed, capture_output=True, text=True, timeout=60)
    said = done.stderr.splitlines()[-1]
    assert "wandb='clip': No API key" in said
    assert "`wandb login`" in said
    assert "WANDB_MODE=offline" in said


@pytest.mark.parametrize("spec", [None, importlib.machinery.ModuleSpec("wandb", None)], ids=["nothing", "a folder"])
def test_where_it_is_not_installed_that_is_said_and_who_does_not_ask_is_not_told(spec, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"wandb='clip': Weights & Biases is not installed; pip install wandb, or"):
        check_wandb(Config(wandb="clip"))
    check_wandb(Config())


@pytest.mark.parametrize("name", ["", "a/b", "100 %", "x" * 129])
def test_a_name_that_no_project_can_have_is_refused(name):
    with pytest.raises(UserError, match="must be the name of a project"):
        Config(wandb=name)
