"""`benchmarks/gpu.py` runs at toy size on a CPU, leaves what it says it does, and refuses in one line."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOY = "ViT-W64/4@16px"
LATE = "time was up"
PARTS = ("peak", "sweep", "training", "encoding", "loss")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The script as a module, in which its parts are modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu

        yield gpu


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def numbers(content: Any) -> Iterator[float]:
    """Yields all numbers in what was read from JSON."""
    if isinstance(content, dict | list):
        for one in content.values() if isinstance(content, dict) else content:
            yield from numbers(one)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content


def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path):
    done = run(f"--output={tmp_path / 'gpu'}")
    assert done.returncode == 2
    assert done.stderr.endswith("no NVIDIA GPU here, but cpu; --toy shows that the script runs\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "gpu").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only=peak,losses"], "--only=losses is none of peak, sweep, training, encoding, loss"),
        (["--variant=RN50"], "--variant=RN50 is none of ViT-L-14, ViT-B-16, ViT-B-32"),
        (["--toy", "--variant=ViT-L-14"], f"--variant=ViT-L-14 is none of {TOY}"),
    ],
)
def test_parts_and_variants_that_are_none_are_refused(gpu, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    with pytest.raises(SystemExit) as exit:
        gpu.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith(f"{words}\n")


@pytest.mark.full
def test_a_toy_run_measures_every_part_or_says_why_not(tmp_path):
    done = run("--toy", f"--output={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in PARTS}
    for part, content in parts.items():
        assert content["device"] == "cpu", part
        assert content["peak"] is None
        assert "cpu" in content["gaps"]["mfu"]
        assert all(math.isfinite(n) for n in numbers(content)), part
    peak, sweep, training, encoding, loss = (parts[part]["found"] for part in PARTS)
    assert peak["rate"] > 0
    measured = [one for one in sweep[TOY]["tried"] if "gap" not in one]
    assert {one["remat"] for one in measured} == {"none", "attention"}
    assert any(one["microbatch"] for one in measured)
    assert any(one["flags"] for one in sweep[TOY]["tried"])
    assert 'config.model.attention = "xla"' in sweep[TOY]["config"]
    assert training[TOY]["swept"]
    for who, side in training[TOY]["sides"].items():
        assert min(side["pairs_per_second"], side["mfu_of_products"]) > 0, who
        assert side["compile_seconds"] >= 0
        assert side["mfu"] is None
        assert side["peak_gb"] is None
        assert side["gaps"]["peak_gb"]
    for who in ("OpenCLIP", "OpenCLIP, torch.compile"):
        assert who in training[TOY]["sides"] or training[TOY]["gaps"][who]
        assert "not the same job" not in training[TOY]["gaps"].get(who, "")
    row = encoding[TOY]["row"]
    assert min(row["found"]["clip_jax"]) > 0
    assert "cuDNN" in row["gaps"]["clip_jax, cuDNN's attention"]
    assert not any("not the same job" in gap for gap in row["gaps"].values())
    [(_, of_size)] = loss.items()
    time, memory = of_size["rows"]
    assert min(min(values) for values in [*time["found"].values(), *memory["found"].values()]) > 0
    assert not any("not the same job" in gap for gap in of_size["gaps"].values())


def processes(gpu, folder: Path, *, until: float = math.inf) -> Any:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return gpu.Processes(folder, scratch, until, say=lambda line: None, where="here")


def test_what_was_measured_is_not_measured_again_in_a_run_that_goes_on(gpu, tmp_path):
    job, found = gpu.Job("product", platform="cpu", n=8, laps=1), {"seconds": [1.0]}
    for one, of_one in ((job, found), (dataclasses.replace(job, n=9), {"gap": "no"})):
        line = {"where": "here", "job": dataclasses.asdict(one), "found": of_one}
        with (tmp_path / "measured.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    again = processes(gpu, tmp_path, until=-math.inf)
    again.resume()
    assert again.run(job) == found
    assert again.run(dataclasses.replace(job, n=9)) == {"gap": LATE}  # what was not measured is tried again
    again.where = "on another device"
    assert again.run(job) == {"gap": LATE}


def test_a_process_that_fails_is_a_gap_and_its_words_are_kept(gpu, tmp_path):
    found = processes(gpu, tmp_path).run(gpu.Job("product", platform="cpu", n=-1))
    assert "invalid tensor" in found["gap"]
    assert not found["no_memory"]
    assert "Traceback" in (tmp_path / "errors.log").read_text()
    flags = processes(gpu, tmp_path).run(gpu.Job("product", platform="cpu", n=8, flags="--xla_no_such_flag=1"))
    assert "xla_no_such_flag" in flags["gap"]


def tried_by(gpu, stage, tried: dict, found) -> list:
    """Returns the jobs that a stage of the sweep asks for, each of which has found what `found` says."""
    jobs = []
    for job in stage:
        tried[job] = found(job)
        jobs.append(job)
    return jobs


def test_larger_batches_are_tried_with_the_faster_attention_as_long_as_there_is_memory(gpu):
    size = gpu.SMALL._replace(attention=("cudnn", "xla"), remat=("none", "full"))
    memory = {"none": 16, "full": 64}

    def found(job) -> dict:
        if job.n > memory[job.remat]:
            return {"gap": "no more", "no_memory": True}
        return {"seconds": [job.n * (1.0 if job.attention == "cudnn" else 2.0) * (1 if job.remat == "none" else 1.4)]}

    base, tried = gpu.Job("step"), {}
    jobs = tried_by(gpu, gpu.sweep.whole_batches(size, (8, 16, 32, 64), base, tried), tried, found)
    assert [(job.n, job.remat, job.attention) for job in jobs] == [
        *((8, remat, attention) for remat in size.remat for attention in size.attention),
        *((16, "none", "cudnn"), (16, "full", "cudnn"), (32, "none", "cudnn"), (32, "full", "cudnn")),
        (64, "full", "cudnn"),
    ]
    best = gpu.sweep.fastest(tried)
    assert (best.remat, best.attention) == ("none", "cudnn")
    parts = tried_by(
        gpu, gpu.sweep.batches_in_parts((8, 16, 32, 64), base, tried), tried, lambda job: {"gap": "refused"}
    )
    assert [(job.n, job.microbatch) for job in parts] == [
        (batch, part) for batch in (64, 128) for part in (best.n, best.n // 2)
    ]


def test_flags_that_gain_are_tried_together(gpu):
    base = gpu.Job("step", n=8)
    tried = {base: {"seconds": [1.0]}}
    taken = {"a": 0.9, "b": 1.0, "c": 0.8}
    jobs = tried_by(gpu, gpu.sweep.flagged("abc", tried), tried, lambda job: {"seconds": [taken.get(job.flags, 0.7)]})
    assert [job.flags for job in jobs] == ["a", "b", "c", "a c"]
    assert gpu.sweep.config_lines(gpu.sweep.fastest(tried))[-1] == 'XLA_FLAGS="a c"'


def test_where_nothing_fits_everything_is_computed_again_in_parts(gpu):
    base = gpu.Job("step", n=8)
    tried = {base: {"gap": "no more", "no_memory": True}}
    jobs = tried_by(gpu, gpu.sweep.batches_in_parts((8,), base, tried), tried, lambda job: {"gap": "no more"})
    assert [(job.n, job.microbatch, job.remat) for job in jobs] == [(8, 4, "full"), (16, 8, "full"), (16, 4, "full")]
    assert list(gpu.sweep.flagged("a", tried)) == []
    assert gpu.sweep.config_lines(gpu.sweep.fastest(tried)) == []


def test_a_peer_whose_first_loss_is_another_is_not_compared(gpu):
    jobs = {who: gpu.Job("step", who=who, n=8) for who in (gpu.training.OURS, gpu.training.PEER, gpu.training.COMPILED)}
    losses = {gpu.training.OURS: 2.0, gpu.training.PEER: 2.01, gpu.training.COMPILED: 2.5}
    tried = {who: {job: {"loss": losses[who], "seconds": [1.0]}} for who, job in jobs.items()}
    assert gpu.training.unequal(tried) == {
        gpu.training.COMPILED: "not the same job: at 8 its first loss is 2.5000, ours 2.0000"
    }


def test_rows_have_who_was_measured_in_all_turns_and_gaps_for_the_rest(gpu):
    turns = [{"clip_jax": {"gb": 1.0}, "a": {"gb": 2.0}, "b": {"gb": None}, "c": {"gap": "no"}} for _ in range(2)]
    row = gpu.training.row_of("job", turns, lambda _, found: found["gb"], gaps={})
    assert row.found == {"clip_jax": [1.0, 1.0], "a": [2.0, 2.0]}
    assert row.gaps == {"c": "no", "b": "the device does not tell"}
    assert gpu.training.row_of("job", turns, lambda _, found: found["gb"], gaps={"clip_jax": "no"}) is None


def test_jobs_survive_being_written_as_json(gpu):
    job = gpu.Job("step", n=8, microbatch=4, lap=0.5)
    assert gpu.Job(**json.loads(json.dumps(dataclasses.asdict(job)))) == job


# A GPU of our making, which runs no process: what `gpu.py` makes of what it is told.

HERE = {"kind": "NVIDIA H200", "platform": "gpu", "bytes": 133e9}
MEMORY = {"clip_jax": 2048, "OpenCLIP": 512, "OpenCLIP, torch.compile": 1024}  # pairs of a step that fit


def made_up(job: Any, slow: float = 2.0) -> dict:
    """Returns what a job would find on it: we are `slow` times as fast as the peers."""
    times = 1.0 if job.who.startswith("clip_jax") else slow
    known = {"compile_seconds": 30.0, "peak_gb": 50.0, "planned_gb": 45.0}
    if job.kind == "device":
        return HERE
    if job.kind == "product":
        return known | {"seconds": [2 * job.n**3 / 790e12]}
    if job.kind == "weights":
        return {"numbers": 1}
    if job.kind == "features":
        return known | {"seconds": [0.02 * times], "features": [[1.0, 0.0], [0.0, 1.0]]}
    if job.kind == "loss":
        if job.n > 65536 and job.who != "clip_jax":
            return {"gap": "RESOURCE_EXHAUSTED", "no_memory": True}
        return {"seconds": [0.04 * times], "loss": 4.0, "peak_gb": 0.55, "planned_gb": 0.5}
    if (job.microbatch or job.n) > MEMORY[job.who]:
        return {"gap": "RESOURCE_EXHAUSTED", "no_memory": True}
    if job.flags.startswith("--xla_gpu_triton"):
        return {"gap": "ended with -6: Unknown flag in XLA_FLAGS"}
    per_pair = 1e-3 * times * (1.2 if job.attention == "xla" else 1.0) * (1.1 if job.microbatch else 1.0)
    return known | {"seconds": [job.n * per_pair * (0.9 if job.flags else 1.0)] * 2, "loss": 6.0, "attention": "cudnn"}


@pytest.fixture
def on_made_up_gpu(gpu, monkeypatch, tmp_path):
    """Runs the script there with these flags; returns the jobs that it has started."""

    def run(*flags: str, found=made_up) -> list:
        jobs = []

        def start(self, job):
            jobs.append(job)
            return found(job)

        monkeypatch.setattr(gpu.Processes, "start", start)
        monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)  # this process is not its own
        monkeypatch.setattr(sys, "argv", ["gpu.py", f"--output={tmp_path}", *flags])
        gpu.main()
        return jobs

    return run


def part(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_on_a_gpu_each_side_is_compared_at_its_best_batch_in_turns(on_made_up_gpu, tmp_path, capsys):
    jobs = on_made_up_gpu("--only=training", "--variant=ViT-B-32")
    found = part(tmp_path, "training")["found"]["ViT-B-32"]
    sides = found["sides"]
    assert {who: side["n"] for who, side in sides.items()} == {"clip_jax": 1024, "OpenCLIP, torch.compile": 1024}
    assert found["gaps"] == {"OpenCLIP": "RESOURCE_EXHAUSTED"}
    assert found["row"]["ratio"] == pytest.approx(2)
    assert found["same_batch"] == {
        "1024": {"clip_jax": pytest.approx(1e3), "OpenCLIP, torch.compile": pytest.approx(500)}
    }
    [cost] = {side["pair_flops"] for side in sides.values()}
    assert sides["clip_jax"]["mfu"] == pytest.approx(1e3 * cost / 989e12)
    assert sides["clip_jax"]["mfu_of_products"] == pytest.approx(1e3 * cost / 790e12)
    turns = [(job.turn, job.who) for job in jobs if job.kind == "step" and job.turn]
    assert turns == [(turn, who) for turn in (1, 2, 3) for who in sides]
    assert "bar 35%" in capsys.readouterr().out


def test_training_takes_what_the_sweep_has_found_best(on_made_up_gpu, tmp_path, capsys):
    on_made_up_gpu("--only=sweep", "--variant=ViT-B-16")
    swept = part(tmp_path, "sweep")["found"]["ViT-B-16"]
    assert (swept["best"]["attention"], swept["best"]["remat"]) == ("cudnn", "none")
    assert {one["remat"] for one in swept["tried"]} == {"none", "dots", "attention", "full"}
    assert {one["gap"] for one in swept["tried"] if "gap" in one} == {"ended with -6: Unknown flag in XLA_FLAGS"}
    assert swept["config"][-1].startswith("XLA_FLAGS=")
    assert 'config.model.attention = "cudnn"' in capsys.readouterr().out
    jobs = on_made_up_gpu("--only=training", "--variant=ViT-B-16")
    ours = [job for job in jobs if job.kind == "step" and job.who == "clip_jax"]
    assert {job.flags for job in ours} == {swept["best"]["flags"]}
    assert part(tmp_path, "training")["found"]["ViT-B-16"]["swept"]


def test_a_variant_of_which_nothing_fits_stays_with_its_errors(on_made_up_gpu, tmp_path):
    def none(job) -> dict:
        return {"gap": "RESOURCE_EXHAUSTED", "no_memory": True} if job.kind == "step" else made_up(job)

    with pytest.raises(SystemExit, match="nothing of ours was measured: sweep of ViT-L-14, training of ViT-L-14"):
        on_made_up_gpu("--only=sweep,training", "--variant=ViT-L-14", found=none)
    assert part(tmp_path, "sweep")["found"]["ViT-L-14"]["best"] is None
    for name in ("sweep", "training"):
        assert {one["gap"] for one in part(tmp_path, name)["found"]["ViT-L-14"]["tried"]} == {"RESOURCE_EXHAUSTED"}


def test_the_loss_goes_on_where_others_have_no_memory_and_is_held_to_its_bars(on_made_up_gpu, tmp_path):
    on_made_up_gpu("--only=loss,encoding")
    found = part(tmp_path, "loss")["found"]
    assert list(found) == [str(2**n) for n in range(12, 19)]
    seconds, memory = found["65536"]["rows"]
    assert (seconds["most"], memory["most"]) == (50.0, 0.6)
    assert memory["found"]["clip_jax"] == [0.55] * 3
    assert found["131072"]["gaps"]["OpenCLIP"] == "RESOURCE_EXHAUSTED"
    assert found["262144"]["gaps"]["clip_jax, dense"] == "no memory at 131,072"
    encoded = part(tmp_path, "encoding")["found"]["ViT-L-14"]["row"]
    assert encoded["fastest"] != "clip_jax, cuDNN's attention"
    assert encoded["ratio"] == pytest.approx(2)


def test_peers_with_other_features_or_losses_are_none(on_made_up_gpu, tmp_path):
    def other(job) -> dict:
        found = made_up(job)
        if job.who == "OpenCLIP":
            found |= {"features": [[1.0, 0.2], [0.0, 1.0]]} if job.kind == "features" else {"loss": 5.0}
        return found

    on_made_up_gpu("--only=loss,encoding", found=other)
    for row in (
        part(tmp_path, "encoding")["found"]["ViT-L-14"]["row"],
        part(tmp_path, "loss")["found"]["4096"]["rows"][0],
    ):
        assert "OpenCLIP" not in row["found"]
        assert "not the same job" in row["gaps"]["OpenCLIP"]
