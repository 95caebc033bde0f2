"""Processes of one run, started on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds for what takes one or two minutes on a quiet machine


def free_port() -> int:
    """Returns a port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    """Starts Python with the arguments, in the repository's root.

    What was compiled before is left alone: process 0 alone would find its own there, and Gloo waits for the others, who
    compile, no longer than 30 s. Without optimisation all of them are quicker. Collectives come one after the other:
    Gloo confuses those that run at the same time.
    """
    flags = "--xla_backend_optimization_level=0 --xla_cpu_enable_concurrency_optimized_scheduler=false"
    quick = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | quick | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen], given: str = "") -> list[tuple[int, str, str]]:
    """Returns (exit code, output, errors) of each process."""
    try:
        for process in processes:  # each reads it as soon as it can: none waits for another's turn
            process.stdin.write(given)
            process.stdin.close()
            process.stdin = None
        said = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]
