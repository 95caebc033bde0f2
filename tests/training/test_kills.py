"""SIGKILL at any moment, during saves too, as often as it may come: the run is the one that was never killed."""

import random
import time
from pathlib import Path

import pytest
from interrupted import identical, run, wait_for_lines, whole
from processes import finish

KILLS = 5  # of a run
MODELS = ("ViT-W64/4@16px", "RN-small")


def fields(model: str) -> dict:
    """Returns what to train: a checkpoint is written most of the time."""
    return {"model.variant": model, "duration": 121, "log_every": 2, "checkpoint_every": 3}


@pytest.fixture(scope="module", params=MODELS)
def uninterrupted(request, data_dir, tmp_path_factory) -> tuple[str, Path]:
    return request.param, whole(tmp_path_factory.mktemp("uninterrupted"), data_dir, fields(request.param))


@pytest.mark.full
@pytest.mark.parametrize("chain", range(5))
def test_a_run_that_is_killed_five_times_is_the_uninterrupted_run(chain, uninterrupted, data_dir, tmp_path):
    model, expected = uninterrupted
    draws = random.Random(f"{model} {chain}")
    metrics, saving = tmp_path / "metrics.jsonl", 0
    for _ in range(KILLS):
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        process = run(tmp_path, data_dir, fields(model))
        wait_for_lines(process, tmp_path, min(lines + draws.randint(-2, 12), 55))
        time.sleep(draws.random() / 10)
        assert process.poll() is None, process.communicate()[1]
        process.kill()
        finish([process])
        saving += any((tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    ((code, _, errors),) = finish([run(tmp_path, data_dir, fields(model))])
    assert (code, "resumed at step" in errors, "damaged" in errors) == (0, True, False), errors
    print(f"{model}: {saving} of {KILLS} kills were in the middle of a save")
    identical(tmp_path, expected)
    assert not list((tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp*")), "cleaned up"
