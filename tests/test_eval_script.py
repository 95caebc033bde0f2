"""`eval.py` as a user runs it: a table, files where the help says they are, mistakes in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def evaluate(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "eval.py", *args],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_results_lie_in_the_workdir_by_step_and_their_paths_are_printed(workdir, data_dir):
    done = evaluate(
        f"--model={workdir}",
        "--task=zeroshot_classification",
        "--dataset=tfds:captioned_digits",
        f"--data_dir={data_dir}",
    )
    assert done.returncode == 0, done.stderr
    stem = workdir / "eval" / "2" / "captioned_digits_test_zeroshot_classification"
    files = [f"{stem}.json", f"{stem}_confusion.png", f"{stem}_matches.png"]
    assert done.stdout.splitlines()[-3:] == files
    assert all(Path(file).is_file() for file in files)
    assert "mean_per_class_recall" in done.stdout


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"task": "zeroshot_retreival"}, "did you mean 'zeroshot_retrieval'"),
        ({"model": "runs/nowhere"}, "'runs/nowhere' is no file, no folder"),
        ({"dataset": "tfds:captioned_digit"}, "'captioned_digit'; there are: captioned_digits, captioned_shapes"),
        ({"dataset": "tfds:captioned_digits:tset"}, "did you mean 'test'"),
        ({"task": None}, "--task is missing"),
    ],
    ids=lambda value: str(value),
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(changed, words, workdir, data_dir):
    flags = {"model": workdir, "task": "zeroshot_retrieval", "dataset": "tfds:captioned_digits", "data_dir": data_dir}
    done = evaluate(*[f"--{name}={value}" for name, value in (flags | changed).items() if value is not None])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
