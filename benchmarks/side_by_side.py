"""One job, done here and by the peers, in turns in one run: medians, the ratio of the fastest peer's to ours, and how
far that goes from round to round. As a table, as JSON, and as a picture.

A group of rows is a module with `rows(quick, folder)`, which yields them; `bench.py` gives each a process of its own.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table
from matplotlib.figure import Figure
from peers import OURS

COLORS = ("#2b7a4b", "#b5483a")  # at least as good as the fastest peer; not so
DPI = 110


@dataclasses.dataclass(frozen=True)
class Row:
    """A job, and what it took: of all that is measured, less is better."""

    job: str
    found: Mapping[str, Sequence[float]]  # by who, round by round
    unit: str = "s"
    bar: float | None = None  # the least ratio that we are held to
    most: float | None = None  # what ours may take at most
    baselines: Sequence[str] = ()  # who is no peer but ours in another way: beside it where there is no peer
    gaps: Mapping[str, str] = dataclasses.field(default_factory=dict)  # who was not measured, and why
    note: str = ""

    def __post_init__(self):
        rounds = {len(values) for values in self.found.values()}
        assert OURS in self.found, f"{self.job}: nothing of ours"
        assert len(rounds) == 1, f"{self.job}: all take turns, {rounds}"
        assert min(rounds) > 0, f"{self.job}: nothing was measured"

    @property
    def fastest(self) -> str | None:
        """Returns the peer with the smallest median, or where there is none such a baseline; None: there is neither."""
        others = [who for who in self.found if who != OURS]
        peers = [who for who in others if who not in self.baselines]
        return min(peers or others, key=self.median, default=None)

    def median(self, who: str) -> float:
        return statistics.median(self.found[who])

    @property
    def ratio(self) -> float | None:
        """Returns the fastest peer's median over ours: above 1, we are the faster."""
        return None if self.fastest is None else self.median(self.fastest) / self.median(OURS)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Returns the smallest and the largest ratio of a round."""
        if self.fastest is None:
            return None
        ratios = [theirs / ours for theirs, ours in zip(self.found[self.fastest], self.found[OURS], strict=True)]
        return min(ratios), max(ratios)

    @property
    def is_kept(self) -> bool | None:
        """Returns whether we are as good as we are held to; None: nothing holds us, or there is no peer."""
        kept = [] if self.most is None else [self.median(OURS) <= self.most]
        kept += [] if self.bar is None or self.ratio is None else [self.ratio >= self.bar]
        return all(kept) if kept else None

    def as_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self) | {"fastest": self.fastest, "ratio": self.ratio, "spread": self.spread}
        return found | {"median": {who: self.median(who) for who in self.found}}

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "Row":
        return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})


def in_turns(jobs: Mapping[str, Callable[[], object]], rounds: int, *, before: int = 0) -> dict[str, list[float]]:
    """Returns the seconds of each job, round by round; a round more, the first, warms up.

    Every round another begins: a peer's threads may still be awake when the next one starts. `before` a call that
    counts come so many in its turn that do not: what takes gigabytes at once, as a step does, finds them given back to
    the system after the others' turns, and in a run its own.
    """
    taken: dict[str, list[float]] = {who: [] for who in jobs}
    order = list(jobs)
    for _ in range(rounds + 1):
        for who in order:
            for _ in range(before):
                jobs[who]()
            start = time.perf_counter()
            jobs[who]()
            taken[who].append(time.perf_counter() - start)
        order = [*order[1:], order[0]]
    return {who: seconds[1:] for who, seconds in taken.items()}


def table(title: str, rows: Iterable[Row]) -> rich.table.Table:
    """Returns the rows, for people."""
    caption = "ratio: the fastest peer's median over ours; above 1 we are faster"
    shown = rich.table.Table(title=title, caption=caption)
    for heading in ("", OURS, "fastest peer", "ratio", "from round to round", "bar", ""):
        shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        bars = [] if row.bar is None else [f"≥ {row.bar}"]
        bars += [] if row.most is None else [f"≤ {row.most:g} {row.unit}"]
        mark = {None: "", True: "", False: " ✗"}[row.is_kept]
        cells = [row.job, f"{row.median(OURS):.3g} {row.unit}", "", "", "", ", ".join(bars) + mark]
        if row.fastest is not None:
            low, high = row.spread
            cells[2] = f"{row.median(row.fastest):.3g} {row.unit} ({row.fastest})"
            cells[3:5] = f"{row.ratio:.2f}", f"{low:.2f} – {high:.2f}"
        others = {who: f"{row.median(who):.3g} {row.unit}" for who in row.found if who not in (OURS, row.fastest)}
        said = [f"{who}: {what}" for who, what in (others | dict(row.gaps)).items()]
        shown.add_row(*cells, "; ".join([*said, row.note] if row.note else said))
    return shown


def draw(path: Path, title: str, groups: Mapping[str, Sequence[Row]]) -> None:
    """Draws a bar for each ratio, group by group, with its spread; a short line is what we are held to."""
    rows = [(group, row) for group, of_group in groups.items() for row in of_group if row.ratio is not None]
    figure = Figure(figsize=(11, 1.4 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))[::-1]
    for place, (_, row) in zip(places, rows, strict=True):
        low, high = row.spread
        axes.barh(place, row.ratio - 1, left=1, height=0.62, color=COLORS[row.ratio < 1], alpha=0.85)
        axes.plot([low, high], [place] * 2, color="black", linewidth=1)
        if row.bar is not None:
            axes.plot([row.bar] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2.4)
        axes.annotate(
            f"{row.ratio:.2f} × {row.fastest}",
            (max(high, row.ratio, row.bar or 1, 1), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    highest = max((max(*row.spread, row.ratio) for _, row in rows), default=1)
    lowest = min((min(*row.spread, row.ratio, row.bar or 1) for _, row in rows), default=1)
    axes.set_xlim(min(0.5, lowest / 1.1), 2 ** (math.log2(max(highest, 2)) * 1.25 + 0.6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_yticks(list(places), [f"{group}: {row.job}" for group, row in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("times as fast as the fastest peer (memory: times as small); thin: from round to round; thick: bar")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=DPI)


def to_json(where: Mapping[str, Any], groups: Mapping[str, Sequence[Row]]) -> str:
    """Returns all that was measured, and on what."""
    found = {group: [row.as_json() for row in rows] for group, rows in groups.items()}
    return json.dumps({"machine": dict(where), "groups": found}, indent=1)
