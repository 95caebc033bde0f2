"""A run that goes on on other numbers of processes and devices is the run that stayed where it was."""

import signal
from pathlib import Path

import pytest
from interrupted import computed, run, wait_for_lines
from processes import finish, free_port

FIELDS = {"duration": 24, "log_every": 1, "data.global_batch": 32, "optim.learning_rate": 1e-3}
DEVICES = 4  # of a process


def segment(workdir: Path, data_dir: Path, processes: int, *, until: int | None) -> None:
    """Lets so many processes go on with the run, and when they have logged so many lines tells one of them to end."""
    cluster = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    several = [run(workdir, data_dir, FIELDS, *cluster, f"--process_id={i}", devices=DEVICES) for i in range(processes)]
    if until is not None:
        wait_for_lines(several[0], workdir, until, seconds=900)
        several[-1].send_signal(signal.SIGTERM)
    ends = finish(several)
    assert [code for code, *_ in ends] == [0] * processes, ends
    assert ("SIGTERM: saved at step" in ends[0][2]) == (until is not None), ends[0][2]


@pytest.mark.full
def test_eight_processes_then_four_then_one_then_two_have_the_losses_of_one_that_stayed(data_dir, tmp_path):
    segment(tmp_path / "stayed", data_dir, 1, until=None)
    for processes, until in ((8, 3), (4, 8), (1, 13), (2, None)):
        segment(tmp_path / "moved", data_dir, processes, until=until)
    stayed, moved = computed(tmp_path / "stayed"), computed(tmp_path / "moved")
    assert [line["step"] for line in moved] == list(range(1, 25))
    for here, there in zip(stayed, moved, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-5), here["step"]
        assert there["valid"] == here["valid"]
