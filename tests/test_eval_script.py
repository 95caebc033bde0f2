"""`eval.py` as a user runs it: a table, files where the help says they are, mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import finish, free_port, start

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


@pytest.mark.full
def test_several_data_sets_and_two_models_are_one_table_and_one_page(workdir, data_dir, tmp_path):
    specs = ["tfds:captioned_digits:test[:40]", "tfds:captioned_shapes:test[:30]"]
    asked = [f"--model={workdir}", f"--model={workdir}/checkpoints/2", f"--data_dir={data_dir}"]
    asked += [f"--dataset={spec}" for spec in specs] + [f"--output={tmp_path}", f"--report={tmp_path / 'page'}"]
    done = evaluate(*asked)
    assert done.returncode == 0, done.stderr
    results = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert [result.rpartition("/")[2] for result in results] == [
        "captioned_digits_test_zeroshot_classification.json",
        "captioned_shapes_test_zeroshot_classification.json",
    ] * 2
    assert len({result.partition("/")[0] for result in results}) == 2, "a folder a model"
    assert "captioned_shapes:test" in done.stdout
    assert (tmp_path / "page" / "index.html").stat().st_size > 10_000
    again = evaluate(*asked, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(" is done") == 4


@pytest.mark.full
def test_a_suite_has_an_average(workdir, data_dir, tmp_path):
    evaluations = [
        {"dataset": "tfds:captioned_digits:test[:50]"},
        {"dataset": "tfds:captioned_digits:test[:50]", "task": "zeroshot_retrieval"},
        {
            "dataset": "tfds:captioned_digits:test[:50]",
            "task": "linear_probe",
            "train": "tfds:captioned_digits:train[:99]",
        },
    ]
    file = tmp_path / "three.json"
    file.write_text(json.dumps({"name": "three", "evaluations": evaluations}))
    done = evaluate(f"--model={workdir}", f"--suite={file}", f"--output={tmp_path / 'out'}", f"--data_dir={data_dir}")
    assert done.returncode == 0, done.stderr
    assert "average" in done.stdout
    assert len(json.loads((tmp_path / "out" / "suites" / "three.json").read_text())["scores"]) == 3


@pytest.mark.full
def test_two_processes_write_what_one_does_and_find_it_done(workdir, data_dir, tmp_path):
    specs = ["tfds:captioned_digits:test[:33]", "tfds:captioned_shapes:test[:30]"]
    same = [f"--model={workdir}", f"--data_dir={data_dir}", *(f"--dataset={spec}" for spec in specs)]
    alone = evaluate(*same, f"--output={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    for turn in range(2):
        both = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", f"--output={tmp_path / 'both'}"]
        again = ["--resume"] * turn
        told = finish(
            [
                start(["eval.py", *same, *both, *again, f"--process_id={i}"], JAX_NUM_CPU_DEVICES="2", COLUMNS="200")
                for i in range(2)
            ]
        )
        assert [code for code, *_ in told] == [0, 0], told
        assert "zeroshot_classification" in told[0][1]
        assert "zeroshot_classification" not in told[1][1], "one of them speaks"
        assert told[0][2].count(" is done") == 2 * turn
    names = sorted(path.name for path in (tmp_path / "alone").glob("*.json"))
    assert len(names) == 2
    for name in names:
        assert json.loads((tmp_path / "both" / name).read_text()) == json.loads((tmp_path / "alone" / name).read_text())


@pytest.mark.full
def test_processes_that_are_asked_different_things_do_not_begin(workdir, data_dir, tmp_path):
    same = [f"--model={workdir}", f"--data_dir={data_dir}", "--dataset=tfds:captioned_digits:test[:33]"]
    same += [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", f"--output={tmp_path / 'out'}"]
    told = finish([start(["eval.py", *same, f"--batch_size={8 + i}", f"--process_id={i}"]) for i in range(2)])
    assert [code for code, *_ in told] == [2, 2], told
    for _, _, errors in told:
        assert "do not agree on what is asked" in errors


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"task": "zeroshot_retreival"}, "did you mean 'zeroshot_retrieval'"),
        ({"model": "runs/nowhere"}, "'runs/nowhere' is no file, no folder"),
        ({"dataset": "tfds:captioned_digits:tset"}, "did you mean 'test'"),
        ({"model": None}, "--model is missing"),
        ({"feature": "pool"}, "value should be one of"),
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
