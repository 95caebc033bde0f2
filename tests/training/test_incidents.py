"""Steps that went wrong: what is skipped is said, with its records; a loss that jumps, too; and when it is enough."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.training.incidents import FEWEST, Incidents
from clip_jax.training.step_lines import StepLines, read_lines

NOISE = np.random.default_rng(0).normal(size=400)


def records(step: int) -> dict[str, list[int]]:
    return {"00000.tar": [step, step + 100]}


def seen(path, losses: list[float], state=None, *, limit: int = 3) -> tuple[Incidents, list[str]]:
    """Returns what has seen these losses, of the steps after those of the state, and what it said."""
    said, first = [], 1 if state is None else state["step"] + 1
    incidents = Incidents(path, records, limit, state)
    with incidents:
        for step, loss in enumerate(losses, start=first):
            incidents.dispatched(step, jnp.float32(loss), jnp.isfinite(loss))
        incidents.read(said.append)
    return incidents, said


def test_a_skipped_update_is_counted_said_and_written_with_its_records(tmp_path):
    incidents, said = seen(tmp_path / "incidents.jsonl", [3.0, float("nan"), 2.9, float("inf"), 2.8])
    assert incidents.skipped == 2
    assert said == [f"step {s}: loss or gradients are not finite; its update is skipped" for s in (2, 4)]
    assert read_lines(tmp_path / "incidents.jsonl") == [
        {"step": step, "kind": "skipped", "loss": None, "records": records(step)} for step in (2, 4)
    ]
    assert incidents.too_many() is None, "they were not in a row"


def test_too_many_in_a_row_are_said_since_when_also_when_the_run_was_interrupted_meanwhile(tmp_path):
    incidents, _ = seen(tmp_path / "i", [3.0, float("nan"), float("nan")])
    assert incidents.too_many() is None
    incidents, _ = seen(tmp_path / "i", [float("nan")], json.loads(json.dumps(incidents.state())))
    assert incidents.too_many().startswith("loss or gradients were not finite from step 2 on: 3 updates in a row")
    assert [line["step"] for line in read_lines(tmp_path / "i")] == [2, 3, 4]


@pytest.mark.parametrize("log_every", [1, 5, 50])
def test_a_row_that_reached_the_limit_is_said_also_when_a_finite_step_was_read_with_it(log_every):
    incidents = Incidents(None, records, 20, None)
    for step in range(1, 51):
        loss = float("nan") if 3 <= step < 44 else 3.0  # 41 in a row
        incidents.dispatched(step, jnp.float32(loss), jnp.isfinite(loss))
        if step % log_every == 0:
            incidents.read(lambda line: None)
            if problem := incidents.too_many():
                break
    assert problem.startswith("loss or gradients were not finite from step 3 on: ")
    row = min(41, step - 2)
    assert f"{row} updates in a row were skipped (skip_limit=20)" in problem
    again = Incidents(None, records, 20, json.loads(json.dumps(incidents.state())))
    assert again.too_many() is None, "a run that was mended goes on"


def test_a_jump_is_noted_and_noise_a_falling_loss_and_a_first_step_are_not(tmp_path):
    falling = 10 * np.exp(-np.arange(400) / 100) + 0.05 * NOISE
    _, said = seen(tmp_path / "none", falling.tolist())
    assert said == []
    falling[250] += 4
    _, said = seen(tmp_path / "one", falling.tolist())
    assert len(said) == 1
    assert said[0].startswith("step 251: the loss jumped to ")
    (line,) = read_lines(tmp_path / "one")
    assert (line["step"], line["kind"], line["records"]) == (251, "spike", records(251))
    assert line["loss"] == pytest.approx(falling[250], rel=1e-6)
    assert line["usual"] == pytest.approx(np.median(falling[150:250]), rel=1e-6)
    _, said = seen(tmp_path / "few", [1.0] * (FEWEST - 1) + [9.0])
    assert said == [], "too few to judge by"
    _, said = seen(tmp_path / "still", [1.0] * FEWEST + [1.05, 1.2])
    assert said == ["step 22: the loss jumped to 1.2000 from about 1.0000"]


@pytest.mark.parametrize("cut", [1, 30, 49, 50, 51])
def test_a_run_that_was_interrupted_notes_what_the_uninterrupted_one_does(cut, tmp_path):
    losses = (3 + 0.1 * NOISE[:80]).tolist()
    losses[49] = 9.0
    losses[50] = float("nan")
    whole, _ = seen(tmp_path / "whole", losses)
    first, _ = seen(tmp_path / "cut", losses[:cut])
    state = json.loads(json.dumps(first.state()))
    seen(tmp_path / "cut", losses[cut : cut + 20], state)  # is killed, and its checkpoint was older
    second, _ = seen(tmp_path / "cut", losses[cut:], state)
    assert second.state() == whole.state()
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(read_lines(tmp_path / "cut")) == 2


def test_a_line_is_strict_json_and_one_cut_short_is_dropped(tmp_path):
    path = tmp_path / "lines"
    lines = StepLines(path, resumed_at=0)
    lines.write({"step": 1, "loss": float("nan"), "norm": float("-inf")})
    lines.write({"step": 2, "loss": 0.1})
    lines.close()
    path.write_text(path.read_text() + '{"step": 3, "lo')
    StepLines(path, resumed_at=9).close()
    assert path.read_text() == '{"step": 1, "loss": null, "norm": null}\n{"step": 2, "loss": 0.1}\n'
