"""SIGTERM: the run saves, ends with 0, and when it is started again it is the run that was never ended."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from interrupted import identical, run, wait_for_lines, whole
from processes import finish, free_port

from clip_jax.training.step_lines import read_lines

STEPS, EVERY, GRACE = 200, 7, 30  # of a run; that are logged; seconds that a scheduler gives
FIELDS = {"duration": STEPS, "log_every": EVERY, "checkpoint_every": 75}


def wait_for_the_handler(process: subprocess.Popen) -> None:
    """Returns when a process catches SIGTERM."""
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nobody listens"
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        caught = int(next(line for line in status if line.startswith("SigCgt")).split()[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory) -> Path:
    return whole(tmp_path_factory.mktemp("uninterrupted"), data_dir, FIELDS)


@pytest.mark.full
@pytest.mark.parametrize("moment", range(10))
def test_a_run_that_is_told_to_end_at_any_moment_saves_and_is_the_uninterrupted_run(
    moment, uninterrupted, data_dir, tmp_path
):
    draws = random.Random(moment)
    process = run(tmp_path, data_dir, FIELDS)
    if moment == 1:  # still starting, and listening already: nobody hears before the interpreter has begun
        wait_for_the_handler(process)
    else:
        wait_for_lines(process, tmp_path, draws.randint(1, STEPS // EVERY - 3))
    time.sleep(draws.random())
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ((code, _, errors),) = finish([process])
    assert (code, time.monotonic() - told < GRACE) == (0, True), errors
    steps = [int(path.name) for path in (tmp_path / "checkpoints").glob("*")]
    if max(steps, default=0) == STEPS:
        pytest.skip("it was done before it was told")
    if steps:
        assert f"SIGTERM: saved at step {max(steps)}; the same command goes on from there" in errors
    else:
        assert "SIGTERM came before a step was trained: there is nothing to save" in errors
    ((code, _, errors),) = finish([run(tmp_path, data_dir, FIELDS)])
    assert (code, f"resumed at step {max(steps, default=0)}" in errors) == (0, bool(steps)), errors
    identical(tmp_path, uninterrupted)


@pytest.mark.full
def test_all_processes_of_a_run_save_at_one_step_when_one_of_them_is_told(data_dir, tmp_path):
    fields = {"duration": 40, "log_every": 2}

    def both() -> list[subprocess.Popen]:
        cluster = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
        return [run(tmp_path, data_dir, fields, *cluster, f"--process_id={i}") for i in range(2)]

    processes = both()
    wait_for_lines(processes[0], tmp_path, 2)
    told = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    ends = finish(processes)
    assert [code for code, *_ in ends] == [0, 0], ends
    assert time.monotonic() - told < GRACE
    (step,) = [path.name for path in (tmp_path / "checkpoints").glob("*")]
    assert f"SIGTERM: saved at step {step}" in ends[0][2]
    ends = finish(both())
    assert ([code for code, *_ in ends], f"resumed at step {step}" in ends[0][2]) == ([0, 0], True), ends
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, *range(2, 41, 2)]


def readers_of(process: subprocess.Popen) -> list[int]:
    """Returns the processes that read data for one that trains."""
    children = [
        int(pid) for file in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in file.read_text().split()
    ]
    return [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.full
def test_a_reader_is_deaf_to_what_a_scheduler_sends_to_all(uninterrupted, data_dir, tmp_path):
    process = run(tmp_path, data_dir, FIELDS | {"data.num_workers": 2})
    wait_for_lines(process, tmp_path, 3)
    readers = readers_of(process)
    assert len(readers) == 2
    for reader in readers:
        os.kill(reader, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    ((code, _, errors),) = finish([process])
    assert (code, "SIGTERM: saved at step" in errors) == (0, True), errors
    ((code, _, errors),) = finish([run(tmp_path, data_dir, FIELDS)])
    assert code == 0, errors
    identical(tmp_path, uninterrupted)


@pytest.mark.full
@pytest.mark.parametrize(("number", "lines"), [(signal.SIGTERM, 0), (signal.SIGKILL, 3)])
def test_readers_do_not_outlive_a_run_that_ends_before_its_first_step_or_is_killed(number, lines, data_dir, tmp_path):
    process = run(tmp_path, data_dir, FIELDS | {"data.num_workers": 2})
    deadline = time.monotonic() + 300
    while len(readers_of(process)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no readers"
        time.sleep(0.01)
    wait_for_lines(process, tmp_path, lines)
    process.send_signal(number)
    try:
        process.communicate(timeout=60)  # as long as a reader is there, its end of the pipe is open
    finally:
        process.kill()
    assert process.returncode == (0 if number == signal.SIGTERM else -number)
