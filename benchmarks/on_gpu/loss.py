"""The loss alone, value and gradients: ours in the form that a run chooses, dense, and OpenCLIP's `ClipLoss`."""

from collections.abc import Mapping

from on_gpu.job import DENSE, EMBED_DIM, FLOAT32, OURS, PEER, SCALE, Found
from on_gpu.lab import Lab, alternating, gaps_of, median, row_of

BARS = {65536: (50.0, 0.6)}  # by pairs: ms and GB at most
# What rounding explains: a logit is SCALE times a cosine of 1 at most, rounded to 8 bits in bfloat16, to 11 in TF32;
# two of them make a loss.
CLOSE = {DENSE: 1e-4, FLOAT32: 2 * SCALE * 2**-11, PEER: 2 * SCALE * 2**-8}


def measure(lab: Lab) -> bool:
    """Keeps two rows for each number of pairs, of time and of memory."""
    full: dict[str, str] = {}  # for whom there was no memory
    measured = False
    for pairs in lab.size.pairs:
        sides = [who for who in (OURS, DENSE, PEER, FLOAT32) if who not in full]
        turns = alternating(lab, {who: lab.job("loss", who=who, n=pairs) for who in sides})
        gaps = full | gaps_of(turns) | far(turns[0])
        full |= {who: f"no memory at {pairs:,}" for who, one in turns[0].items() if one.get("no_memory")}
        most_ms, most_gb = BARS.get(pairs, (None, None))
        known = {"baselines": (DENSE,), "gaps": gaps}
        name = f"{pairs:,} pairs, {EMBED_DIM} wide"
        time_row = row_of(name, turns, lambda _, found: 1000 * median(found), unit="ms", most=most_ms, **known)
        memory_row = row_of(
            f"{name}: memory", turns, lambda _, found: taken_gb(found), unit="GB", most=most_gb, **known
        )
        rows = [row for row in (time_row, memory_row) if row is not None]
        found = {"rows": [row.as_json() for row in rows], "gaps": gaps, "first": turns[0]}
        lab.report.keep("loss", **{str(pairs): found})
        if not rows:
            lab.console.print(f"{name}: {gaps[OURS]}", style="red")
            break
        lab.show("loss", rows)
        measured = True
    return measured


def taken_gb(found: Found) -> float | None:
    """Returns the GB beside the embeddings: the larger of what was planned and what was there; None: neither is
    known."""
    known = [found[name] for name in ("planned_gb", "peak_gb") if found.get(name) is not None]
    return max(known, default=None)


def far(found: Mapping[str, Found]) -> dict[str, str]:
    """Returns whose loss is not ours."""
    losses = {who: one["loss"] for who, one in found.items() if "gap" not in one}
    ours = losses.get(OURS)
    return {
        who: f"not the same job: a loss of {one:.5f}, and ours {ours:.5f}"
        for who, one in losses.items()
        if ours is not None and who != OURS and abs(one - ours) > CLOSE[who]
    }
