"""A run of two processes: one folder, and no process outlives another by a minute."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import shards
from processes import PATIENCE, finish, free_port, start

from clip_jax.config import Config, DataConfig
from clip_jax.data.pipeline import training_pairs
from clip_jax.data.sources import open_training_source
from clip_jax.models.variants import architecture
from clip_jax.training.feed import merged
from clip_jax.training.step_lines import read_lines

STEPS, EVERY = 60, 20


def run(workdir: Path, data_dir: Path, *own: list[str]) -> list[subprocess.Popen]:
    """Starts `train.py` twice, on two devices each, as a user would; `own` are arguments of one process alone."""
    fields = {
        "duration": STEPS,
        "log_every": 1,
        "checkpoint_every": EVERY,
        "optim.warmup": 2,
        "data.global_batch": 16,
        "data.data_dir": data_dir,
        "mesh.fsdp": 2,
    }
    same = ["train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", "--num_processes=2"]
    same += [f"--config.{name}={value}" for name, value in fields.items()] + [f"--coordinator=127.0.0.1:{free_port()}"]
    own = own or ([], [])
    return [start([*same, f"--process_id={i}", *own[i]], JAX_NUM_CPU_DEVICES="2") for i in range(2)]


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(workdir / "metrics.jsonl")]


def wait_until_between_checkpoints(workdir: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + PATIENCE
    metrics = workdir / "metrics.jsonl"
    while not (
        metrics.exists()
        and metrics.read_text().count("\n") >= EVERY + 4
        and (workdir / "checkpoints" / str(EVERY)).exists()
    ):
        assert time.monotonic() < deadline, "the run did not get far enough"
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.002)


def worker_of(process: subprocess.Popen) -> int:
    """Returns the id of the process that does the work."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    (_, _, said), (_, _, silent) = ends = finish(run(workdir, data_dir))
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "mesh data × fsdp × tensor = 2 × 2 × 1" in said
    assert "fsdp" in said.partition("parameters: ")[2], "how parameters are split"
    assert "mesh" not in silent
    assert "parameters" not in silent
    return workdir


def die(workdir: Path, data_dir: Path, victim: int, number: int) -> None:
    """Sends a signal to one process between two checkpoints, and checks what becomes of the other."""
    processes = run(workdir, data_dir)
    wait_until_between_checkpoints(workdir, processes)
    worker = worker_of(processes[victim])
    os.kill(worker, number)
    asked = time.monotonic()
    ((code, _, said),) = finish([processes[1 - victim]])
    seconds = time.monotonic() - asked
    print(f"{signal.Signals(number).name} of process {victim}: the other ended after {seconds:.1f} s")
    if number == signal.SIGSTOP:
        os.kill(worker, signal.SIGKILL)
    finish([processes[victim]])
    assert seconds < 60
    assert code == 1
    assert "because another process of the run died or could not be reached" in said
    assert f"The last checkpoint is {workdir}/checkpoints/" in said
    assert "start all processes again with the same command, and the run goes on from there" in said


@pytest.mark.full
def test_the_first_process_dies_and_the_other_ends_with_words(data_dir, tmp_path):
    die(tmp_path, data_dir, 0, signal.SIGKILL)


@pytest.mark.full
@pytest.mark.parametrize(
    ("victim", "number"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],  # stopped: as one that cannot be reached any more
)
def test_a_run_of_which_a_process_died_goes_on_from_its_checkpoint_as_if_nothing_had_happened(
    victim, number, whole, data_dir, tmp_path
):
    die(tmp_path, data_dir, victim, number)
    assert len(losses(tmp_path)) < STEPS, "killed too late to show anything"
    ends = finish(run(tmp_path, data_dir))
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "resumed at step" in ends[0][2]
    assert losses(tmp_path) == losses(whole)
    assert [step for step, _ in losses(tmp_path)] == list(range(1, STEPS + 1))


@pytest.mark.full
def test_processes_with_other_configs_are_all_refused_and_nothing_is_written(data_dir, tmp_path):
    ends = finish(run(tmp_path / "run", data_dir, [], ["--config.seed=1"]))
    for code, _, said in ends:
        assert code == 2, said
        assert "do not agree on the config (process 0 and 1)" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_what_either_process_finds_damaged_both_pass_over(whole, data_dir, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    arrays = sorted((workdir / "checkpoints" / str(STEPS) / "params").glob("*/0*"))
    for array in arrays[:2]:  # neighbours: each process reads one of them
        array.write_bytes(array.read_bytes()[:-1])
    ends = finish(run(workdir, data_dir))
    assert [code for code, *_ in ends] == [0, 0], ends
    assert f"resumed at step {STEPS - EVERY}" in ends[0][2]
    assert f"moved to {workdir}/damaged/{STEPS}-0" in ends[0][2]
    assert losses(workdir) == losses(whole)


@pytest.mark.full
def test_a_mistake_of_one_process_alone_ends_the_other_within_a_minute(data_dir, tmp_path):
    mistaken, other = run(tmp_path, data_dir, [], ["--config.data.train=tfds:no_such_set"])[::-1]
    ((code, _, said),) = finish([mistaken])
    assert code == 2, said
    asked = time.monotonic()
    ((code, _, said),) = finish([other])
    assert time.monotonic() - asked < 60
    assert code in (1, 2), said
    assert "another process of the run died or could not be reached" in said


@pytest.mark.full
def test_what_each_process_cannot_read_is_counted_together_and_too_much_of_it_stops_both(tmp_path):
    images = {n: shards.picture(n, width=300, height=300) for n in range(50, 60)}
    bad = [(f"{n:08}", shards.files(n, jpg=image[: len(image) // 2])) for n, image in images.items()]
    folder = shards.write_several(tmp_path / "data", shards=1, records=50)
    shards.write(folder / "00001.tar", bad)
    fields = [f"--config.data.train=wds:{folder}", "--config.duration=6", "--config.log_every=2"]
    ends = finish(run(tmp_path / "run", tmp_path, fields, fields))
    assert [code for code, *_ in ends] == [0, 0], ends
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    counted = merged([line.get("bad_records", {}) for line in lines])
    config = Config(data=DataConfig(train=f"wds:{folder}", global_batch=16))
    pairs = training_pairs(config, architecture(config.model), None, open_training_source(config.data), rows=range(16))
    expected = sum(not pairs[i].batch.valid for i in range(6 * 16))
    assert counted == {"00001.tar": {"damaged image": expected}}
    assert expected > 8
    assert f"left out {expected} pairs" in ends[0][2]
    ends = finish(run(tmp_path / "other", tmp_path, *[[*fields, "--config.data.bad_limit=0.0005"]] * 2))
    for code, _, said in ends:
        assert code == 2, said
        assert "of the last 10,000 pairs cannot be read; left out:" in said
        assert "in 00001.tar (" in said
