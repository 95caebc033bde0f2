"""SIGTERM, by which schedulers say that a machine is about to be taken away: the run saves, and ends well.

A process of several leaves it to JAX's preemption service, which settles on a step for all (see `distributed`). One
that is alone hears it here.
"""

import contextlib
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
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)

    def listen() -> None:
        while os.read(ear, 1)[0] != signal.SIGTERM:
            pass
        told.set()
        if not asked.is_set():
            print("SIGTERM came before a step was trained: there is nothing to save", file=sys.stderr, flush=True)
            os._exit(0)

    def preempted(step: int) -> bool:
        asked.set()
        return told.is_set()

    threading.Thread(target=listen, name="preemption", daemon=True).start()
    former = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    try:
        yield preempted
    finally:
        signal.set_wakeup_fd(former[1])
        signal.signal(signal.SIGTERM, former[0])


def deaf(*_: int) -> None:
    """Makes a process that reads data deaf to SIGTERM, which schedulers send to all: the one that trains needs it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
