"""What all parts of `gpu.py` measure with: who runs their jobs, where what they find is kept, how it is compared."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench
import rich.console
from on_gpu.apart import LATE, Processes
from on_gpu.job import Found, Job
from peers import OURS
from side_by_side import Row, table

from clip_jax import flops
from clip_jax.models.variants import VARIANTS


class Model(NamedTuple):
    """At which batches a model is trained, and the MFU that we are held to."""

    batches: tuple[int, ...]
    bar: float | None


class Size(NamedTuple):
    """How much is measured."""

    lap: float  # seconds, at least one call
    laps: int  # of a process
    turns: int  # processes of each side
    products: tuple[int, ...]  # rows of the matrices
    images: int  # encoded at once
    pairs: tuple[int, ...]  # of the loss
    attention: tuple[str, ...]
    remat: tuple[str, ...]
    flags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """The files PART.json of a folder: what was found, by variant or size, and on what."""

    folder: Path
    head: dict[str, Any]

    def found(self, part: str) -> dict[str, Any]:
        """Returns what a part has found on this device, this time or another."""
        file = self.folder / f"{part}.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        return content["found"] if content and self._is_of(content) else {}

    def keep(self, part: str, **found: Any) -> None:
        """Writes what was found, beside what is there."""
        partial = self.folder / f"partial-{part}.json"
        partial.write_text(json.dumps(self.head | {"found": self.found(part) | found}, indent=1))
        partial.replace(self.folder / f"{part}.json")

    def _is_of(self, content: dict[str, Any]) -> bool:
        """Returns whether a file is of the same device and packages."""
        packages = content["machine"]["packages"] == self.head["machine"]["packages"]
        return packages and all(content[name] == self.head[name] for name in ("device", "toy"))


@dataclasses.dataclass(frozen=True)
class Lab:
    """What every part measures with."""

    processes: Processes
    console: rich.console.Console
    report: Report
    size: Size
    platform: str  # as JAX names it

    @classmethod
    def of(cls, processes: Processes, console: rich.console.Console, device: Found, size: Size, *, toy: bool) -> "Lab":
        """Returns what measures on such a device, as the job "device" has found it."""
        kind, machine = device["kind"], bench.where()
        head = {"device": kind, "toy": toy, "machine": machine, "bytes": device["bytes"], "peak": flops.PEAKS.get(kind)}
        if head["peak"] is None:
            head["gaps"] = {"mfu": f"clip_jax/flops.py knows no peak of {kind!r}"}
        processes.folder.mkdir(parents=True, exist_ok=True)
        processes.where = json.dumps([kind, machine["packages"]])
        report = Report(processes.folder, head)
        return cls(processes, console, report, size, device["platform"])

    def run(self, job: Job) -> Found:
        return self.processes.run(job)

    def job(self, kind: str, **what: Any) -> Job:
        return Job(kind, platform=self.platform, lap=self.size.lap, laps=self.size.laps, **what)

    def show(self, title: str, rows: Sequence[Row]) -> None:
        self.console.print(table(title, rows))


def median(found: Found) -> float:
    return statistics.median(found["seconds"])


def rate(job: Job, found: Found) -> float:
    """Returns pairs a second; 0: it was not measured."""
    return 0.0 if "gap" in found else job.n / median(found)


def fastest(tried: Mapping[Job, Found]) -> Job | None:
    """Returns the job with the most pairs a second; None: none was measured."""
    best = max(tried, key=lambda job: rate(job, tried[job]), default=None)
    return None if best is None or "gap" in tried[best] else best


def as_json(tried: Mapping[Job, Found]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(job) | found for job, found in tried.items()]


def alternating(lab: Lab, jobs: Mapping[str, Job], first: int = 0) -> list[dict[str, Found]]:
    """Returns what each side finds, turn by turn; fewer turns where the time is up, but one at least. Whoever could not
    be measured in the first is not asked again."""
    turns: list[dict[str, Found]] = []
    for turn in range(first, first + lab.size.turns):
        known = {who: found for who, found in turns[0].items() if "gap" in found} if turns else {}
        found = {who: known.get(who) or lab.run(dataclasses.replace(job, turn=turn)) for who, job in jobs.items()}
        if turns and any(one.get("gap") == LATE for one in found.values()):
            break
        turns.append(found)
    return turns


def gaps_of(turns: Sequence[Mapping[str, Found]]) -> dict[str, str]:
    """Returns why a side was not measured in one of its turns."""
    return {who: found["gap"] for turn in reversed(turns) for who, found in turn.items() if "gap" in found}


def row_of(
    job: str, turns: Sequence[Mapping[str, Found]], measure: Callable[[str, Found], float | None], **known: Any
) -> Row | None:
    """Returns a row of who was measured in all turns and is no gap; None: we are one."""
    gaps = gaps_of(turns) | known.pop("gaps")
    values = {who: [measure(who, turn[who]) for turn in turns] for who in turns[0] if who not in gaps}
    gaps |= {who: "the device does not tell" for who, of_who in values.items() if None in of_who}
    found = {who: of_who for who, of_who in values.items() if who not in gaps}
    return Row(job, found, gaps=gaps, **known) if OURS in found else None


def used(lab: Lab, job: Job, found: Found) -> dict[str, float | None]:
    """Returns pairs a second, and their FLOPs over the data sheet's peak, and over the rate of products."""
    arch, pairs_per_second = VARIANTS[job.variant], rate(job, found)
    cost = flops.of_pair(arch).training() + flops.of_loss(1, job.n, arch.embed_dim, ring=False)
    rates = {"mfu": lab.report.head["peak"], "mfu_of_products": lab.report.found("peak").get("rate")}
    shares = {name: of and pairs_per_second * cost / of for name, of in rates.items()}
    return {"pairs_per_second": pairs_per_second, "pair_flops": cost} | shares


def percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def prepare(lab: Lab, variant: str) -> None:
    """Lets the weights be written that all sides start from, once; a side that does not find them says so."""
    if not (lab.processes.scratch / variant).exists():
        found = lab.processes.start(lab.job("weights", variant=variant, n=8))
        lab.console.print(f"weights of {variant}: {found.get('gap', 'written')}")
