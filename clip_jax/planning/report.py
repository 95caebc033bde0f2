"""Plans as people read them, and as programs do."""

import json
from typing import Any

import rich.console
import rich.table

from clip_jax.planning.plan import Plan
from clip_jax.planning.search import Remedy
from clip_jax.planning.topology import GENERATIONS, GiB

ESTIMATE = "the compiler's estimate, not a measurement"


def size(count: int | float) -> str:
    """Returns bytes as people say them, in units of 1024 as TPU memory is sold."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: int | float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def verdict(plan: Plan) -> str:
    """Returns whether it fits, and by how much, in a sentence."""
    memory = plan.memory
    if plan.fits:
        return f"fits: {size(memory.used)} of {size(memory.limit)} a chip, {size(memory.spare)} to spare"
    return (
        f"does not fit: {size(memory.used)} needed, {size(memory.limit)} there, {size(-memory.spare)} too much a chip"
    )


def show(plan: Plan, console: rich.console.Console) -> None:
    """Prints a plan as a table of facts and one of collectives."""
    console.print(_facts(plan))
    if plan.collectives:
        console.print(_collectives(plan))


def _facts(plan: Plan) -> rich.table.Table:
    generation = GENERATIONS[plan.topology.partition(":")[0]]
    memory, step = plan.memory, plan.step
    table = rich.table.Table(title=f"{plan.variant} on {plan.topology}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("memory", verdict(plan), style="green" if plan.fits else "red")
    for name in ("parameters", "optimizer", "batch", "temporaries"):
        table.add_row(f"  {name}", size(getattr(memory, name)))
    micro = "" if plan.microbatch is None else f", in microbatches of {plan.microbatch:,}"
    table.add_row("batch", f"{plan.global_batch:,} pairs, {plan.global_batch / plan.chips:g} a chip{micro}")
    mesh = " × ".join(f"{axis} {places}" for axis, places in plan.mesh.items())
    table.add_row("mesh", f"{plan.chips} chips: {mesh}")
    table.add_row("computed in", f"{plan.compute_dtype}, remat {plan.remat}; loss: {plan.loss}")
    if step is not None:
        table.add_row("step", f"{duration(step.seconds)} at {generation.clock / 1e9:g} GHz ({ESTIMATE})")
        table.add_row(
            "", f"without collectives: {duration(step.link_seconds)} more if nothing overlapped, at full speed"
        )
        table.add_row("speed", f"{step.pairs_per_second:,.0f} pairs/s")
        table.add_row("MFU", f"{100 * step.mfu:.1f} % of {generation.peak / 1e12:g} TFLOP/s a chip (bfloat16, dense)")
    table.add_row("compiled in", duration(plan.compile_seconds))
    return table


def _collectives(plan: Plan, rows: int = 8) -> rich.table.Table:
    table = rich.table.Table(title="collectives, for each chip", title_justify="left")
    for name in ("kind", "times a step", "each", "a step"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for one in plan.collectives[:rows]:
        table.add_row(one.kind, f"{one.count:,}", size(one.size), size(one.bytes))
    if others := plan.collectives[rows:]:
        count, total = sum(one.count for one in others), sum(one.bytes for one in others)
        table.add_row(f"{len(others)} smaller ones", f"{count:,}", "", size(total))
    return table


def as_json(plan: Plan, remedies: list[Remedy], search: list[Plan], best: Plan | None) -> str:
    """Returns everything, as one JSON object; bytes and seconds."""
    tried = [{"changes": remedy.changes, "plan": remedy.plan.to_json()} for remedy in remedies]
    found: dict[str, Any] | None = None
    if search:
        found = {"largest": best and best.to_json(), "tried": [one.to_json() for one in search]}
    return json.dumps({"plan": plan.to_json(), "remedies": tried, "find_batch": found}, indent=2)


def markdown_row(plan: Plan, config: str) -> str:
    """Returns a row of the table in docs/scaling.md."""
    memory, step = plan.memory, plan.step
    parts = [memory.parameters, memory.optimizer, memory.batch, memory.temporaries]
    cells = [
        config,
        plan.variant,
        plan.topology,
        f"{plan.global_batch:,}",
        " × ".join(map(str, plan.mesh.values())),
        f"{memory.used / GiB:.1f} of {memory.limit / GiB:.1f}" + ("" if plan.fits else " (does not fit)"),
        " + ".join(f"{part / GiB:.1f}" for part in parts),
        *(("–",) * 4 if step is None else ()),
    ]
    if step is not None:
        moved = sum(one.bytes for one in plan.collectives)
        cells += [
            f"{moved / GiB:.2f}",
            duration(step.seconds),
            f"{step.pairs_per_second:,.0f}",
            f"{100 * step.mfu:.0f} %",
        ]
    return f"| {' | '.join(cells)} |"


MARKDOWN_HEAD = """\
| config | model | slice | batch | data × fsdp × tensor | GiB a chip | parameters + optimiser + batch + temporaries | \
GiB of collectives a chip | step | pairs/s | MFU |
|---|---|---|---|---|---|---|---|---|---|---|"""
