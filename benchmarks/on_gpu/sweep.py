"""Which settings are best: attention, what the backward pass computes again, batch, parts of it, XLA's flags.

Stages yield jobs one by one, by what those before them have found.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from on_gpu.job import Found, Job
from on_gpu.lab import Lab, Model, Size, as_json, fastest, percent, rate, used

GAIN = 1.005  # times as fast: what a flag has to give


def measure(lab: Lab, variant: str, model: Model) -> bool:
    """Keeps what each setting gives, in the order in which they were tried, and the best one's lines for a config."""
    base, tried = lab.job("step", variant=variant, n=model.batches[0]), {}
    for stage in (
        whole_batches(lab.size, model.batches, base, tried),
        batches_in_parts(model.batches, base, tried),
        flagged(lab.size.flags, tried),
    ):
        for job in stage:
            tried[job] = lab.run(job)
            best = fastest(tried)
            found = {"tried": as_json(tried), "best": best and dataclasses.asdict(best)}
            lab.report.keep("sweep", **{variant: found | {"config": config_lines(best)}})
    if best is None:
        lab.console.print(f"{variant}: no setting could be measured", style="red")
        return False
    numbers = used(lab, best, tried[best])
    shown = f"{numbers['pairs_per_second']:,.0f} pairs/s, MFU {percent(numbers['mfu'])}"
    lab.console.print(f"{variant}, the best of {len(tried)} settings: {shown}")
    lab.console.print("\n".join(f"    {line}" for line in config_lines(best)))
    return True


def whole_batches(size: Size, batches: Sequence[int], base: Job, tried: Mapping[Job, Found]) -> Iterator[Job]:
    """Yields all pairs of policy and attention at the smallest batch; at larger ones every policy with the attention
    that was faster, as long as there is memory."""
    smallest, *larger = batches
    for remat, attention in itertools.product(size.remat, size.attention):
        yield dataclasses.replace(base, n=smallest, remat=remat, attention=attention)
    for batch, remat in itertools.product(larger, size.remat):
        best = fastest({job: found for job, found in tried.items() if (job.n, job.remat) == (smallest, remat)})
        if best is not None and not any(tried[job].get("no_memory") for job in tried if like(job, best)):
            yield dataclasses.replace(best, n=batch)


def like(job: Job, other: Job) -> bool:
    return dataclasses.replace(job, n=other.n) == other


def batches_in_parts(batches: Sequence[int], base: Job, tried: Mapping[Job, Found]) -> Iterator[Job]:
    """Yields the largest batch and its double in parts as large as the best so far, and half as large; where no batch
    fits, with all computed again."""
    best = fastest(tried) or dataclasses.replace(base, remat="full")
    for batch, part in itertools.product((batches[-1], 2 * batches[-1]), (best.n, best.n // 2)):
        if part < batch:
            yield dataclasses.replace(best, n=batch, microbatch=part)


def flagged(flags: Sequence[str], tried: Mapping[Job, Found]) -> Iterator[Job]:
    """Yields the best setting with each flag, then with all that gain."""
    if (best := fastest(tried)) is None:
        return
    single = {flag: dataclasses.replace(best, flags=flag) for flag in flags}
    yield from single.values()
    gained = [flag for flag, job in single.items() if rate(job, tried[job]) > GAIN * rate(best, tried[best])]
    if len(gained) > 1:
        yield dataclasses.replace(best, flags=" ".join(gained))


def config_lines(best: Job | None) -> list[str]:
    """Returns what a config, and the environment, have to say for a setting."""
    if best is None:
        return []
    lines = ['config.model.compute_dtype = "bfloat16"', f'config.model.attention = "{best.attention}"']
    lines += [f'config.model.remat = "{best.remat}"', f"config.data.global_batch = {best.n}"]
    lines += [] if best.microbatch is None else [f"config.microbatch = {best.microbatch}"]
    return lines + ([f'XLA_FLAGS="{best.flags}"'] if best.flags else [])
