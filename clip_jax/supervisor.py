"""Says in plain words why a process of several has ended.

When one process dies, JAX ends the others from C++, past any Python handler. So each of them is two: the one that
works, and beside it a light one, which has imported neither JAX nor NumPy, waits, and has the last word.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator

from clip_jax import distributed, preemption
from clip_jax.distributed import Cluster
from clip_jax.errors import UserError
from clip_jax.files import AnyPath
from clip_jax.preemption import Preempted

LOST = 75  # how the working process says that it lost another: EX_TEMPFAIL
JOINED, MISTAKEN = b"j", b"m"  # what else it says, through a socket: that it has joined; that it found a mistake


@contextlib.contextmanager
def watched(cluster: Cluster | None, workdir: AnyPath | None) -> Iterator[Preempted]:
    """Runs its block as one process of the cluster's, watched by another; without a cluster it just runs it.

    Yields what says, when it is asked after every step, whether the run is to save and to end (SIGTERM).

    Without a workdir nothing can be saved, and SIGTERM ends the process as it ends any.

    The watching process never comes back: it exits as the working one did (0 done, 2 the user's mistake), and with 1
    and an explanation when that has died.
    """
    if cluster is None:
        with preemption.heard() if workdir is not None else contextlib.nullcontext(preemption.never) as preempted:
            yield preempted
        return
    link = _fork(cluster, workdir)
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # JAX waits in C++, where Python's own handler would never run
        with distributed.joined(cluster, preemptible=workdir is not None):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            link.send(JOINED)
            yield distributed.preempted
    except UserError:
        link.send(MISTAKEN)
        raise
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except Exception as error:
        if distributed.is_of_another(error):
            _exit(LOST, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        _exit(1, traceback.format_exc())


def _exit(code: int, words: str) -> None:
    """Ends the process without waiting for anybody: the others would wait for it."""
    print(words, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _fork(cluster: Cluster, workdir: AnyPath | None) -> socket.socket:
    """Returns the working process's end of a socket; the watching process goes no further than this.

    The working process and those that it starts (readers of data) are a group: none of them outlives it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = socket.socketpair()
    worker = os.fork()
    if worker == 0:
        os.setpgid(0, 0)
        ours.close()
        threading.Thread(target=_die_with_the_other, args=(theirs,), daemon=True).start()
        return theirs
    theirs.close()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(worker, number))
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(worker, signal.SIGKILL)
    sys.exit(_told(code, _received(ours), cluster, workdir))


def _received(link: socket.socket) -> bytes:
    """Returns what the working process, now gone, had said."""
    link.setblocking(False)
    try:
        return link.recv(100)
    except (BlockingIOError, ConnectionError):  # a process of its own may hold the other end still
        return b""


def _die_with_the_other(link: socket.socket) -> None:
    """Waits for nothing but the other process's end, whatever it dies of."""
    with contextlib.suppress(ConnectionError):
        link.recv(1)
    os.killpg(0, signal.SIGKILL)


def _told(code: int, said: bytes, cluster: Cluster, workdir: AnyPath | None) -> int:
    """Returns the exit code for the world, having said what has happened."""
    if MISTAKEN in said:  # it has told the user, and may have died while it waited for the others to find it, too
        return 2
    if code in (0, 2, 130):
        return code
    if code == -signal.SIGINT:
        print("interrupted", file=sys.stderr)
        return 130
    if code == -signal.SIGTERM:
        print(f"stopped by SIGTERM; {_way_on(workdir)}", file=sys.stderr)
        return 128 + signal.SIGTERM
    print(f"error: {_reason(code, JOINED in said, cluster)}.\n{_way_on(workdir)}", file=sys.stderr, flush=True)
    return 1


def _reason(code: int, joined: bool, cluster: Cluster) -> str:
    if code == -signal.SIGABRT and not joined:
        return f"{distributed.GATHERING} s were waited for {cluster.gathering()}, and not all of them came"
    if code in (LOST, -signal.SIGABRT):
        return (
            "this process has stopped because another process of the run died or could not be reached; what that one "
            "died of, its own output says"
        )
    if code == -signal.SIGKILL:
        return "this process was killed (SIGKILL), which is often the system's way out when memory is full"
    if code < 0:
        return f"this process was ended by {signal.Signals(-code).name}"
    return "this process has stopped with the error above, and the others will stop, too"


def _way_on(workdir: AnyPath | None) -> str:
    if workdir is None:
        return "Start all processes again with the same command; with --resume, what is done is not done again."
    from clip_jax.workdir import Workdir  # not before: NumPy comes along, with threads, and a fork wants none

    folder = Workdir(workdir)
    step = folder.latest_step()
    if step is None:
        return "There is no checkpoint yet: start all processes again with the same command, and the run begins anew."
    return (
        f"The last checkpoint is {folder.checkpoints / str(step)}: start all processes again with the same command, "
        "and the run goes on from there."
    )
