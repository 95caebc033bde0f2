"""A process of several ends with words, whatever it ends by; and ends when the one that watches it does."""

import signal

import pytest
from processes import finish, free_port, start

# The block runs in the working process; nobody else is waited for.
ALONE = """
import os, signal, sys, time
from pathlib import Path
from clip_jax import distributed, supervisor
from clip_jax.errors import UserError
distributed.GATHERING = 3
cluster = distributed.find("127.0.0.1:{port}", {processes}, {process})
try:
    with supervisor.watched(cluster, Path({workdir!r})):
        {block}
except UserError as error:
    sys.exit(2)
"""


def ended(block: str, workdir="nowhere", processes: int = 1, process: int = 0) -> tuple[int, str]:
    code = ALONE.format(port=free_port(), block=block, workdir=str(workdir), processes=processes, process=process)
    ((code, _, errors),) = finish([start(["-c", code])])
    return code, errors


@pytest.mark.parametrize(
    ("block", "code", "words"),
    [
        ("pass", 0, ""),
        ("raise UserError('no')", 2, ""),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise RuntimeError('a bug')", 1, "this process has stopped with the error above"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "this process was killed (SIGKILL), which is often"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1, "this process was ended by SIGSEGV"),
        ("os.abort()", 1, "because another process of the run died or could not be reached"),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(300)", 143, "stopped by SIGTERM"),
    ],
)
def test_every_end_has_its_code_and_words(block, code, words):
    found, errors = ended(block)
    assert found == code, errors
    assert words in errors
    assert ("start all processes again with the same command" in errors) == (code in (1, 143))


def test_the_last_checkpoint_is_named_and_an_unfinished_one_is_not(tmp_path):
    for name in ("4", "12", "16.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "config.json").touch()
    _, errors = ended("os.abort()", tmp_path)
    assert f"The last checkpoint is {tmp_path}/checkpoints/12: start all processes again" in errors


def test_a_process_that_nobody_joins_says_where_it_waited_for_how_many():
    code, errors = ended("pass", processes=3, process=1)
    assert code == 1
    assert "3 s were waited for 3 processes at 127.0.0.1:" in errors


def test_the_working_process_ends_with_the_one_that_watches_it():
    block = "print(os.getpid(), flush=True); time.sleep(300)"
    process = start(["-c", ALONE.format(port=free_port(), block=block, workdir="nowhere", processes=1, process=0)])
    assert int(process.stdout.readline()) != process.pid
    process.send_signal(signal.SIGKILL)
    assert process.stdout.read() == "", "its end of the pipe is closed: it is gone"
    finish([process])
