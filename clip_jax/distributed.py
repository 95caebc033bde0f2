"""The processes of one run: who they are, how this one joins them, and what they have to agree on.

JAX finds the others by itself where the launcher says who they are; elsewhere three flags do. Nothing here imports jax
before it joins: what asks for a device earlier would have devices of its own.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError

GATHERING = 300  # seconds for all processes to come; nodes and containers do not start together
PREPARING = 600  # seconds that one process may need longer than another until it has opened its data
HEARTBEAT = 30  # seconds without a sign of life, after which a process counts as dead, and JAX ends all others
LEAVING = 40  # seconds that a process which is done waits for the others

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX reads

FLAGS = "--coordinator=HOST:PORT --num_processes=N --process_id=I"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process comes to know the others."""

    source: str  # in words: "SLURM"
    arguments: Mapping[str, Any]  # of jax.distributed.initialize; what is missing, JAX finds

    def gathering(self) -> str:
        """Returns who was waited for, and where."""
        if not self.arguments:
            return f"the processes that {self.source} told of"
        return f"{self.arguments['num_processes']} processes at {self.arguments['coordinator_address']}"


def find(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environ: Mapping[str, str] = os.environ
) -> Cluster | None:
    """Returns the cluster that the flags or else the environment say this process is one of; None: it is alone.

    Raises:
        UserError: they contradict themselves, or say too little.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        source = _detected(environ)
        return None if source is None else Cluster(source, {})
    if None in given:
        raise UserError(f"a process of several needs all of {FLAGS}, or none of them where JAX finds the others itself")
    address = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
    if address is None or not 0 < int(address[1]) < 2**16:
        raise UserError(f"--coordinator={coordinator} should be HOST:PORT, the address of process 0")
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} must be in 0 … {num_processes - 1}, with {num_processes=}")
    names = ("coordinator_address", "num_processes", "process_id")
    # The flags are all that counts: in a step of SLURM, JAX would otherwise still take one GPU only.
    arguments = dict(zip(names, given, strict=True)) | {"cluster_detection_method": "deactivate"}
    return Cluster("the command line", arguments)


def _detected(environ: Mapping[str, str]) -> str | None:
    """Returns the launcher that started several processes, in the order in which JAX asks; None: nobody did.

    A launcher of one process is none: a single process needs no port.
    """
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:  # OpenMPI 5 does without
            flags = "--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK"
            raise UserError(
                "mpirun does not say where its first process is, as OpenMPI before version 5 did; start it as mpirun … "
                "bash -c 'JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK python train.py … --coordinator=HOST:PORT "
                f"{flags}' (the first word only where each process has a GPU)"
            )
        return "OpenMPI"
    if all(name in environ for name in SLURM) and _number(environ, "SLURM_NTASKS") > 1:
        return "SLURM"
    if _on_tpu(environ):
        return "TPU"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed Kubernetes job: the package `kubernetes` is needed to find the others "
                f"(pip install kubernetes), or {FLAGS}"
            )
        return "Kubernetes"
    if unknown := [name for name in ("WORLD_SIZE", "PMI_SIZE") if _number(environ, name) > 1]:
        raise UserError(
            f"{unknown[0]}={environ[unknown[0]]} says that this is one process of several, by a launcher that JAX does "
            f"not know: give it {FLAGS}, or unset {unknown[0]}"
        )
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 1


def _on_tpu(environ: Mapping[str, str]) -> bool:
    """Returns whether JAX will use the TPU chips of this machine, which may be one of a pod."""
    allowed = environ.get("JAX_PLATFORMS") or "tpu"
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]
    return "tpu" in allowed and bool(chips) and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def joined(cluster: Cluster, *, preemptible: bool = True) -> Iterator[None]:
    """Makes this process one of the cluster's for a block, in which jax has the devices of all; `preemptible` says
    that SIGTERM is asked about by `preempted`, and ends nobody.

    When the block is done, or has ended with a UserError (which every process finds), it waits for the others to come
    as far. Any other error leaves at once, so that the others notice.

    Raises:
        UserError: it cannot join. But when some process does not come in time, JAX ends this one past any handler.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", preemptible)  # SIGTERM to any process is for all
    try:
        jax.distributed.initialize(
            **cluster.arguments,
            initialization_timeout=GATHERING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LEAVING,
        )
    except Exception as error:  # of JAX, of the network, of Kubernetes
        if not (cluster.source == "TPU" and "coordinator_address should be defined" in str(error)):
            raise UserError(f"cannot join {cluster.gathering()}: {_line(error)}; {FLAGS} says who they are") from error
    try:
        yield
    except UserError:
        atexit.register(_leave)  # once it is said: if no other process has found it, that takes a while
        raise
    _leave()


def preempted(step: int) -> bool:
    """Returns whether this is the step at which all processes are to save and to end, for one of them got SIGTERM.

    All ask after every step. JAX settles on the first step that none of them has begun.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def _leave() -> None:
    import jax

    with contextlib.suppress(jax.errors.JaxRuntimeError):  # some process did not come: it has its own words
        jax.distributed.shutdown()


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def is_of_another(error: BaseException) -> bool:
    """Returns whether an error says that another process cannot be reached."""
    words = r"gloo|nccl|connection (closed|reset|refused)|coordination|heartbeat|unavailable|socket closed|barrier"
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and bool(re.search(words, str(error), re.I))


def gather(fact: Any) -> list[Any]:
    """Returns what every process says, by its number, in every process the same; plain JSON values, all at one time."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [fact]
    mine = np.frombuffer(json.dumps(fact).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    room = 1 << int(max(sizes) - 1).bit_length()  # few lengths: each is a program of its own
    padded = np.pad(mine, (0, room - len(mine)), constant_values=ord(" "))
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def of_first(call: Callable[[], Any]) -> Any:
    """Returns what a call returns in process 0, plain JSON values, in every process: what one decides or writes, and
    the others have to know of.

    Raises:
        UserError: the call raised it; the others would wait for process 0 on the devices.
    """
    import jax

    found, mistake = None, None
    if jax.process_index() == 0:
        try:
            found = call()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            mistake = str(error)
    found, mistake = gather([found, mistake])[0]
    if mistake is not None:
        raise UserError(mistake)
    return found


def agree(facts: Mapping[str, Any]) -> None:
    """Raises UserError, in every process the same, when not all processes were told the same facts; names those.

    They are compared by their JSON. Processes may come minutes apart: what devices do together waits less long.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from orbax.checkpoint import multihost

    if jax.process_count() == 1:
        return
    multihost.get_barrier_sync_fn()(key="agree", timeout_ms=1000 * PREPARING)
    mine = [hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest()[:8] for fact in facts.values()]
    all_of_them = multihost_utils.process_allgather(np.frombuffer(b"".join(mine), np.uint32).reshape(len(facts), 2))
    differ = (all_of_them != all_of_them[0]).any(axis=2)  # [process, fact]
    problems = [
        f"{name} (process 0 and {', '.join(map(str, np.flatnonzero(differ[:, i])))})"
        for i, name in enumerate(facts)
        if differ[:, i].any()
    ]
    if problems:
        raise UserError(
            f"the processes of this run do not agree on {'; '.join(problems)}: start them with the same command, with "
            "the workdir in a folder that all of them share"
        )
