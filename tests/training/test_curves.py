"""The picture of runs' curves: drawn whatever the lines hold, and refused with words where there is nothing to draw."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from clip_jax.errors import UserError
from clip_jax.training import curves
from clip_jax.training.curves import Curve, read_run, report, smoothed

ROOT = Path(__file__).parents[2]


def a_run(like: Path, path: Path, lines: list[dict], results: dict[str, dict] | None = None) -> Path:
    """Makes the folder of a run that logged these lines."""
    path.mkdir(parents=True)
    shutil.copy(like / "config.json", path)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, metrics in (results or {}).items():
        (path / "eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "eval" / name).write_text(json.dumps({"metrics": metrics}))
    return path


def size_of(picture: Path) -> tuple[int, int]:
    with PIL.Image.open(picture) as image:
        return image.size


def lines(count: int, **more) -> list[dict]:
    return [{"step": 10 * i, "loss": 5 / i, "image_to_text_accuracy": 1 - 1 / i} | more for i in range(1, count + 1)]


@pytest.mark.full
def test_a_real_run_is_drawn_from_the_command_line_into_its_folder(workdir):
    command = [sys.executable, "-m", "clip_jax.training.report", str(workdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(workdir / "curves.png"), done.stderr
    assert size_of(workdir / "curves.png") == (1600, 1000)


def test_runs_of_any_length_with_anything_in_their_lines_are_drawn_together(workdir, tmp_path, monkeypatch):
    odd = lines(3000, mfu=0.4, device_memory=7e10)
    odd[5] |= {"loss": None, "bad_records": {"0.tar": {"no caption": 3}}}
    results = {f"{step}/a_zeroshot_classification.json": {"acc1": 0.1, "acc5": float("nan")} for step in (20, 100)}
    results |= {f"30/{task}.json": {"lp": 0.5, "other": 0.2} for task in "bcdefg"}
    runs = [
        a_run(workdir, tmp_path / "one" / "_$run", odd, results),
        a_run(workdir, tmp_path / "two" / "_$run", lines(1), {"10/a_zeroshot_classification.json": {"acc1": 0.2}}),
        a_run(workdir, tmp_path / "diverged", lines(5, loss=None)),
    ]
    incidents = [{"step": 60, "kind": "skipped", "loss": None}, {"step": 65, "kind": "spike", "loss": 9.0}]
    (runs[0] / "incidents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in incidents))
    monkeypatch.chdir(tmp_path)
    assert report(runs) == Path("curves.png")
    assert size_of(Path("curves.png")) == (1600, 1000)
    assert report(runs[:1], tmp_path / "new" / "x.png") == tmp_path / "new" / "x.png"


def test_what_a_run_says_is_read_as_it_is(workdir, tmp_path):
    logged = lines(4)
    logged[1]["loss"] = None
    logged[2]["bad_records"] = {"0.tar": {"no caption": 3, "no image": 1}}
    results = {"20/x.json": {"acc5": 0.5, "acc1": 0.25}, "100/x.json": {"acc5": 0.5, "acc1": 0.75}}
    run = read_run(a_run(workdir, tmp_path / "run", logged, results), "run")
    assert [list(values) for values in run.curve("loss")] == [[10, 30, 40], [5, 5 / 3, 5 / 4]]
    assert list(run.left_out().values) == [0, 0, 4, 4]
    assert {metric: [list(x) for x in curve] for metric, curve in run.results["x"].items()} == {
        "acc1": [[20, 100], [0.25, 0.75]]
    }
    assert run.about.endswith("batch 16, step 40, loss 1.25")
    run = read_run(a_run(workdir, tmp_path / "diverged", lines(2, loss=None)), "run")
    assert run.about.endswith("step 20, loss not finite")
    assert not len(run.curve("loss").steps)


def test_a_course_keeps_a_line_a_line_and_a_median_forgets_what_happens_now_and_then():
    steps = np.arange(1.0, 5001)
    line = smoothed(Curve(steps, 3 * steps), "mean")
    assert len(line.steps) <= curves.POINTS
    inner = slice(30, -30)
    np.testing.assert_allclose(line.values[inner], 3 * line.steps[inner], rtol=1e-2)
    now_and_then = np.where(steps % 100, 50.0, 0.0)
    assert set(smoothed(Curve(steps, now_and_then), "median").values) == {50.0}
    short = Curve(np.array([1.0, 2.0]), np.array([4.0, 2.0]))
    assert [list(x) for x in smoothed(short, "mean")] == [[1, 2], [4, 2]]


def test_what_is_no_run_or_has_nothing_to_draw_is_named(workdir, tmp_path):
    with pytest.raises(UserError, match=r"nothing is not a run's folder: it has no config\.json; name a --workdir"):
        report([tmp_path / "nothing"])
    with pytest.raises(UserError, match="has no metrics yet"):
        report([a_run(workdir, tmp_path / "empty", [])])
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has no metrics yet"):
        report([tmp_path / "empty"])
    (tmp_path / "empty" / "metrics.jsonl").write_text("no JSON\n{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is damaged"):
        report([tmp_path / "empty"])
    with pytest.raises(UserError, match="11 runs are more than can be told apart by colour; name 10 at most"):
        report([workdir] * 11)
