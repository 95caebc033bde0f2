"""Who the processes of a run are, whatever started them, and what becomes of those that nobody joins."""

import json

import pytest
from processes import finish, free_port, start

from clip_jax import distributed
from clip_jax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
MPIRUN_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


def test_three_flags_are_a_cluster_and_jax_then_asks_nobody_else():
    cluster = distributed.find("10.0.0.1:1234", 4, 3, SLURM)
    assert cluster.arguments == {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    assert cluster.gathering() == "4 processes at 10.0.0.1:1234"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("host:1", 2, None), "all of --coordinator=HOST:PORT --num_processes=N --process_id=I"),
        ((None, None, 0), "all of --coordinator"),
        (("host", 2, 0), "--coordinator=host should be HOST:PORT"),
        (("host:99999", 2, 0), "--coordinator=host:99999 should be HOST:PORT"),
        (("host:1", 0, 0), "--num_processes=0 must be at least 1"),
        (("host:1", 2, 2), r"--process_id=2 must be in 0 … 1"),
        (("host:1", 2, -1), r"--process_id=-1 must be in 0 … 1"),
    ],
)
def test_flags_that_say_too_little_or_what_cannot_be_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        distributed.find(*flags, {})


@pytest.mark.parametrize(
    ("environ", "source"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "8"}, None),  # salloc's shell, or sbatch without srun
        (MPIRUN_4, "OpenMPI"),
        (MPIRUN_4 | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLURM | MPIRUN_4, "OpenMPI"),  # as JAX decides
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of its own
    ],
)
def test_a_launcher_of_several_processes_is_known_by_its_environment(environ, source):
    cluster = distributed.find(None, None, None, environ)
    assert (cluster and cluster.source) == source


def test_a_tpu_vm_is_one_of_a_pod_unless_jax_is_told_to_stay_off_the_chips(monkeypatch):
    monkeypatch.setattr(distributed.Path, "glob", lambda self, pattern: ["accel0"])
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert distributed.find(None, None, None, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).source == "TPU"
    assert distributed.find(None, None, None, {"JAX_PLATFORMS": ""}).source == "TPU"
    assert distributed.find(None, None, None, {"JAX_PLATFORMS": "cpu"}) is None


def test_an_indexed_job_of_kubernetes_needs_its_package_or_the_flags(monkeypatch):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1", "JAX_PLATFORMS": "cuda"}
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install kubernetes.*--coordinator"):
        distributed.find(None, None, None, pod)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: object())
    assert distributed.find(None, None, None, pod).source == "Kubernetes"


def test_openmpi_5_which_jax_cannot_ask_is_told_the_flags():
    environ = {name: value for name, value in MPIRUN_4.items() if name != "OMPI_MCA_orte_hnp_uri"}
    with pytest.raises(UserError, match=r"LOCAL_DEVICE_IDS=\$OMPI.* --process_id=\$OMPI_COMM_WORLD_RANK"):
        distributed.find(None, None, None, environ)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_of_an_unknown_launcher_are_told_the_flags(name):
    with pytest.raises(UserError, match=rf"{name}=8 says that this is one process of several.*--coordinator"):
        distributed.find(None, None, None, {name: "8"})
    assert distributed.find("host:1", 8, 0, {name: "8"}).source == "the command line"
    assert distributed.find(None, None, None, {name: "1"}) is None


JOIN = """
import json
from clip_jax import distributed
with distributed.joined(distributed.find(None, None, None)):
    import jax
    seen = {"index": jax.process_index(), "count": jax.process_count(), "devices": jax.device_count()}
    try:
        distributed.agree({"the seed": 1, "the data": jax.process_index()})
    except distributed.UserError as error:
        seen["error"] = str(error)
print(json.dumps(seen))
"""


@pytest.mark.parametrize("launcher", [SLURM, MPIRUN_4])
def test_processes_that_a_launcher_started_join_and_all_hear_of_what_they_do_not_agree_on(launcher):
    port = str(free_port())
    ranks = [name for name in launcher if name.endswith(("PROCID", "LOCALID", "RANK"))]
    started = [
        start(
            ["-c", JOIN],
            **launcher | dict.fromkeys(ranks, str(i)),
            JAX_COORDINATOR_PORT=port,
            JAX_COORDINATOR_BIND_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_CPU_DEVICES="2",
        )
        for i in range(2)
    ]
    for i, (code, output, errors) in enumerate(finish(started)):
        assert code == 0, errors
        # Gloo prints lines of its own, when it likes.
        (line,) = (line for line in output.splitlines() if line.startswith("{"))
        seen = json.loads(line)
        assert (seen["index"], seen["count"], seen["devices"]) == (i, 2, 4)
        assert "do not agree on the data (process 0 and 1): start them with the same command" in seen["error"]
