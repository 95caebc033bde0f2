"""A training step beside OpenCLIP's, compiled and as it is: at every batch, and each at its best."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from on_gpu.job import COMPILED, OURS, PEER, SCALE, Found, Job
from on_gpu.lab import Lab, Model, alternating, as_json, fastest, gaps_of, median, percent, prepare, rate, row_of, used
from side_by_side import Row

BAR = 1.3  # times as fast as the faster of the two
# What rounding explains: a logit is SCALE times a cosine of 1 at most, rounded to 8 bits; two of them make a loss.
CLOSE = 2 * SCALE * 2**-8


def measure(lab: Lab, variant: str, model: Model) -> bool:
    """Keeps every batch's rate of every side, what compiling took with it; then a row of turns, each at its best batch.
    The sweep may have measured ours before; in the turns it is measured beside the others."""
    prepare(lab, variant)
    best = lab.report.found("sweep").get(variant, {}).get("best")
    setting = lab.job("step", variant=variant) if best is None else Job(**best)
    tried = every_batch(lab, setting, model.batches)
    gaps = unequal(tried)
    chosen = {who: fastest(of_who) for who, of_who in tried.items()}
    gaps |= {who: next(iter(tried[who].values()))["gap"] for who in tried if chosen[who] is None}
    jobs = {who: job for who, job in chosen.items() if who not in gaps}
    known = {"setting": dataclasses.asdict(setting), "swept": best is not None, "bar": model.bar}
    known |= {"tried": [one for of_who in tried.values() for one in as_json(of_who)], "same_batch": same_batch(tried)}
    sides = {who: summary(lab, job, [tried[who][job]]) for who, job in jobs.items()}
    lab.report.keep("training", **{variant: known | {"sides": sides, "gaps": gaps, "row": None}})
    if OURS not in jobs:
        lab.console.print(f"{variant}: {gaps[OURS]}", style="red")
        return False
    turns = alternating(lab, jobs, first=1)
    gaps = gaps_of(turns) | gaps
    measured = [who for who in jobs if who not in gaps]
    batches = ", ".join(f"{who} {job.n:,}" for who, job in jobs.items())
    row = row_of(
        f"1,000 pairs in steps of {variant}",
        turns,
        lambda who, found: 1000 / rate(jobs[who], found),
        bar=BAR,
        gaps=gaps,
        note=f"batches: {batches}",
    )
    sides |= {who: summary(lab, jobs[who], [tried[who][jobs[who]], *(turn[who] for turn in turns)]) for who in measured}
    lab.report.keep("training", **{variant: known | {"sides": sides, "gaps": gaps, "row": row and row.as_json()}})
    show_training(lab, variant, model, row, sides, same_batch(tried))
    return row is not None


def every_batch(lab: Lab, setting: Job, batches: Sequence[int]) -> dict[str, dict[Job, Found]]:
    """Returns what each side finds at each batch, one side after the other, as long as there is memory; ours in the
    parts of the setting where a batch is larger than one."""
    tried: dict[str, dict[Job, Found]] = {OURS: {}, COMPILED: {}, PEER: {}}
    for batch in sorted({*batches, setting.n} - {0}):
        for who, of_who in tried.items():
            job = dataclasses.replace(setting, n=batch)
            if (job.microbatch or 0) >= batch:
                job = dataclasses.replace(job, microbatch=None)
            if who != OURS:
                job = lab.job("step", who=who, variant=setting.variant, n=batch)
            if not any(found.get("no_memory") for found in of_who.values()):
                of_who[job] = lab.run(job)
    return tried


def unequal(tried: Mapping[str, Mapping[Job, Found]]) -> dict[str, str]:
    """Returns the peers whose first loss is not ours at a batch that both were measured at."""
    losses = {who: {job.n: one["loss"] for job, one in of.items() if "gap" not in one} for who, of in tried.items()}
    gaps = {}
    for who in losses.keys() - {OURS}:
        for batch in losses[who].keys() & losses[OURS].keys():
            theirs, ours = losses[who][batch], losses[OURS][batch]
            if abs(theirs - ours) > CLOSE:
                gaps[who] = f"not the same job: at {batch:,} its first loss is {theirs:.4f}, ours {ours:.4f}"
    return gaps


def same_batch(tried: Mapping[str, Mapping[Job, Found]]) -> dict[int, dict[str, float]]:
    """Returns pairs a second of every side, by the batches that all were measured at."""
    found = [{job.n: rate(job, one) for job, one in of_who.items() if rate(job, one)} for of_who in tried.values()]
    measured = {who: of_who for who, of_who in zip(tried, found, strict=True) if of_who}
    both = set.intersection(*map(set, measured.values())) if OURS in measured and len(measured) > 1 else set()
    return {batch: {who: of_who[batch] for who, of_who in measured.items()} for batch in sorted(both)}


def summary(lab: Lab, job: Job, found: Sequence[Found]) -> dict[str, Any]:
    """Returns what is told of a side: its rate by the turns, what compiling took by what was found before them; what
    its device does not tell is a gap."""
    first, *turns = found
    told = {name: first.get(name) for name in ("compile_seconds", "peak_gb", "planned_gb", "loss", "attention")}
    told["peak_gb"] = max((one["peak_gb"] for one in found if one["peak_gb"] is not None), default=None)
    gaps = {"peak_gb": "the device does not tell"} if told["peak_gb"] is None else {}
    seconds = [median(one) for one in turns or [first]]
    how = {name: value for name, value in dataclasses.asdict(job).items() if name != "attention"}
    return how | told | used(lab, job, {"seconds": seconds}) | ({"gaps": gaps} if gaps else {})


def show_training(
    lab: Lab, variant: str, model: Model, row: Row | None, sides: Mapping[str, dict], same: Mapping[int, dict]
) -> None:
    if row is not None:
        lab.show("training", [row])
    for who, side in sides.items():
        memory = "memory unknown" if side["peak_gb"] is None else f"{side['peak_gb']:.1f} GB"
        mfu = f"MFU {percent(side['mfu'])}, of the rate of products {percent(side['mfu_of_products'])}"
        bar = f" (bar {model.bar:.0%})" if who == OURS and model.bar is not None else ""
        lab.console.print(
            f"{variant}, {who} at {side['n']:,}: {side['pairs_per_second']:,.0f} pairs/s, {mfu}{bar}, {memory}, "
            f"compiled in {side['compile_seconds']:.0f} s"
        )
    for batch, rates in same.items():
        others = ", ".join(f"{rates[OURS] / rates[who]:.2f} × {who}" for who in rates if who != OURS)
        lab.console.print(f"{variant}, all at {batch:,}: {others}")
