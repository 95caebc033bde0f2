"""A process of several ends with words, whatever it ends by; and ends when the one that watches it does."""

import signal
import time

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
        ("os.kill(os.getppid(), signal.SIGINT); time.sleep(300)", 130, "interrupted"),
        ("raise RuntimeError('a bug')", 1, "this process has stopped with the error above"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "this process was killed (SIGKILL), which is often"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1, "this process was ended by SIGSEGV"),
        ("os.abort()", 1, "because another process of the run died or could not be reached"),
    ],
)
def test_every_end_has_its_code_and_words(block, code, words):
    found, errors = ended(block)
    assert found == code, errors
    assert words in errors
    assert ("start all processes again with the same command" in errors) == (code == 1)


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


def test_who_waits_for_others_can_be_interrupted():
    ends = {
        signal.SIGINT: (130, "interrupted"),
        signal.SIGTERM: (143, "stopped by SIGTERM; There is no checkpoint yet"),
    }
    waiting = {}
    for number in ends:
        block = ALONE.replace("GATHERING = 3", "GATHERING = 300").format(
            port=free_port(), block="pass", workdir="nowhere", processes=2, process=1
        )
        waiting[number] = start(["-c", f"print(flush=True)\n{block}"])
    for process in waiting.values():
        process.stdout.readline()
    time.sleep(10)  # jax is imported, and they wait
    for number, process in waiting.items():
        process.send_signal(number)
    for number, (code, words) in ends.items():
        _, errors = waiting[number].communicate(timeout=60)
        assert (waiting[number].returncode, errors.strip().splitlines()[-1][: len(words)]) == (code, words)


HEARD = """
import os, signal, time
from clip_jax import preemption
with preemption.heard() as preempted:
    {block}
"""


@pytest.mark.parametrize(
    ("block", "code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(300)", 0, "SIGTERM came before a step was trained"),
        ("[preempted(1), os.kill(os.getpid(), signal.SIGTERM), time.sleep(1), exit(7 + preempted(2))]", 8, ""),
        ("exit(7 + preempted(1))", 7, ""),
        ("pass\nos.kill(os.getpid(), signal.SIGTERM); time.sleep(300)", -signal.SIGTERM, ""),
    ],
)
def test_a_lone_process_hears_sigterm_and_ends_by_it_only_where_nothing_can_be_lost(block, code, words):
    ((found, _, errors),) = finish([start(["-c", HEARD.format(block=block)])])
    assert found == code, errors
    assert words in errors


READING = """
import multiprocessing, threading, time
from clip_jax import preemption

def read():
    preemption.become_reader()
    print("reading", flush=True)
    time.sleep(3600)

if __name__ == "__main__":
    with preemption.heard():
        reader = multiprocessing.get_context("spawn").Process(target=read, daemon=True)
        starter = threading.Thread(target=reader.start)  # which ends, as Grain's may
        starter.start()
        starter.join()
        time.sleep(3600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_readers_of_a_lone_process_end_with_it(number, tmp_path):
    """As long as one of them is there, its end of the pipe is open."""
    file = tmp_path / "reading.py"
    file.write_text(READING)
    process = start([str(file)])
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.5)
    assert process.poll() is None, "a reader whose trainer is there goes on"
    process.send_signal(number)
    try:
        process.communicate(timeout=30)
    finally:
        process.kill()


READER = "reader = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])"


@pytest.mark.parametrize(("killed", "block"), [("watching", "time.sleep(3600)"), ("working", "os.abort()")])
def test_neither_the_working_process_nor_its_readers_outlive_an_end(killed, block):
    """As long as one of them is there, its end of the pipe is open."""
    block = f"import subprocess; {READER}; print(os.getpid(), flush=True); {block}"
    process = start(["-c", ALONE.format(port=free_port(), block=block, workdir="nowhere", processes=1, process=0)])
    assert int(process.stdout.readline()) != process.pid
    if killed == "watching":
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
