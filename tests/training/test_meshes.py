"""Twenty steps on any mesh, in one process or in several, give the losses of one device."""

import dataclasses
import functools
import json

import pytest
from mesh_losses import Case
from processes import ROOT, finish, free_port, start

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
ACROSS = {2: (1, 1, 8), 4: (2, 1, 4)}  # by the number of processes: a tensor axis that crosses them
FLOAT32_STEPS = {"vit": 20, "resnet": 5}  # batch norm amplifies rounding: beyond these it shows, through no fault


def run(processes: int, cases: list[Case]) -> list[list[dict]]:
    """Returns, for each process, what it found in each case, on eight devices in all."""
    port, script = free_port(), str(ROOT / "tests" / "training" / "mesh_losses.py")
    alone = {"JAX_ENABLE_COMPILATION_CACHE": "true"} if processes == 1 else {}
    started = [start([script, *map(str, (port, processes, i, 8 // processes))], **alone) for i in range(processes)]
    ends = finish(started, json.dumps([dataclasses.asdict(case) for case in cases]))
    for code, _, errors in ends:
        assert code == 0, errors
    results = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for _, output, _ in ends]
    assert all(len(found) == len(cases) for found in results)
    return results


def case(tower: str, dtype: str, sizes: tuple[int, int, int] | None, form: str = "dense") -> Case:
    return Case(tower, dtype, sizes, form, FLOAT32_STEPS[tower] if dtype == "float32" else 20)


@functools.cache
def on_one_device(tower: str, dtype: str) -> list[float]:
    return run(1, [case(tower, dtype, None)])[0][0]["losses"]


def check(processes: int, cases: list[Case]) -> list[list[dict]]:
    """Runs the cases, and compares every loss of every process with that of one device."""
    results = run(processes, cases)
    for found in results:
        for asked, result in zip(cases, found, strict=True):
            expected = on_one_device(asked.tower, asked.dtype)
            bound = 1e-9 if asked.dtype == "float64" else 1e-5
            assert len(result["losses"]) == asked.steps
            assert result["losses"] == pytest.approx(expected, rel=bound, abs=0), asked
    return results


def test_a_mesh_of_8_has_the_losses_of_one_device_in_float64():
    check(1, [case("vit", "float64", (2, 2, 2), "ring")])
    losses = on_one_device("vit", "float64")
    assert losses[-1] != pytest.approx(losses[0], rel=0.05), "nothing was trained"


@pytest.mark.full
def test_two_hosts_on_one_tensor_axis_read_the_same_rows_and_have_the_losses_of_one_device():
    first, second = check(2, [case("vit", "float64", (1, 1, 8))])
    assert first[0]["rows"] == second[0]["rows"] == list(range(16))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_every_mesh_and_form_of_the_loss_has_the_losses_of_one_device(tower, dtype):
    check(1, [case(tower, dtype, sizes, form) for sizes in MESHES for form in ("dense", "ring")])


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "sizes", "form"),
    [
        ("float64", (8, 1, 1), "ring"),
        ("float64", (2, 4, 1), "dense"),
        ("float64", (2, 2, 2), "ring"),
        ("float64", "across", "ring"),
        ("float32", (2, 2, 2), "ring"),
    ],
)
@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_have_the_losses_of_one_device(processes, tower, dtype, sizes, form):
    results = check(processes, [case(tower, dtype, ACROSS[processes] if sizes == "across" else sizes, form)])
    rows = [mine[0]["rows"] for mine in results]
    if sizes != "across":
        share = 16 // processes
        assert rows == [list(range(i * share, (i + 1) * share)) for i in range(processes)]
    elif processes == 2:
        assert rows == [list(range(16))] * 2
    else:  # two places on the batch axes, each that of two processes
        assert rows == [list(range(8))] * 2 + [list(range(8, 16))] * 2
