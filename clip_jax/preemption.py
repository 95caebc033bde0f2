"""SIGTERM, by which schedulers say that a machine is about to be taken away: the run saves, and ends well.

A process of several leaves it to JAX's preemption service, which settles on a step for all (see `distributed`). One
that is alone hears it here.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

Preempted = Callable[[int], bool]  # asked after every step: whether the run is to save, and to end


def never(step: int) -> bool:
    """Returns False: for runs that end by themselves."""
    return False


@contextlib.contextmanager
def heard() -> Iterator[Preempted]:
    """Hears SIGTERM during its block, and yields what to ask after every step.

    Before it is asked for the first time nothing has been trained that could be lost: SIGTERM then ends the process at
    once, with exit code 0, also where the main thread is inside of XLA for minutes and no handler of Python's runs.
    """
    told, asked = threading.Event(), threading.Event()
    signals, wakeup = os.pipe()  # the interpreter writes a signal's number into it, whatever the main thread does
    os.set_blocking(wakeup, False)

    def listen() -> None:
        while os.read(signals, 1)[0] != signal.SIGTERM:
            pass
        told.set()
        if not asked.is_set():
            print("SIGTERM came before a step was trained: there is nothing to save", file=sys.stderr, flush=True)
            os._exit(0)

    def preempted(step: int) -> bool:
        asked.set()
        return told.is_set()

    threading.Thread(target=listen, name="preemption", daemon=True).start()
    former = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    try:
        yield preempted
    finally:
        signal.set_wakeup_fd(former[1])
        signal.signal(signal.SIGTERM, former[0])


def become_reader(*_: int) -> None:
    """Makes this process one that reads data for a trainer, which started it: deaf to SIGTERM, which schedulers send to
    all, for the trainer needs it to finish its step; and gone when the trainer is, whatever that ended by."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if trainer := multiprocessing.parent_process():
        # Not prctl's PDEATHSIG: that is sent when the thread ends which started a process, and Linux alone has it.
        threading.Thread(target=_end_with, args=(trainer,), name="end with the trainer", daemon=True).start()


def _end_with(other: multiprocessing.process.BaseProcess) -> None:
    """Ends this process as soon as the other has ended."""
    other.join()
    os._exit(1)
