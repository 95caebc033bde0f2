"""Training here beside training in OpenCLIP, from the same weights on the same batches: losses, and zero-shot accuracy
on what was held out, of a small ViT and a small ResNet in three precisions.

    make benchmark-training

Hardware: any CPU; needs PyTorch and OpenCLIP (as `make test` installs them).
Time: about a quarter of an hour on 2 cores.
`--picture=FILE` draws the curves.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np
import rich.console
import rich.progress
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from beside_open_clip import (  # noqa: E402
    ARCHITECTURES,
    BARS,
    PRECISIONS,
    STEPS,
    Trained,
    apart,
    ends_by_rounding,
    in_another_order,
    ours,
    start,
    theirs,
)

ORDERS = {"order 1": 1, "order 2": 2}  # seeds by which the rows of each batch have other places
COLORS = dict(zip(PRECISIONS, mpl.colormaps["tab10"].colors, strict=False))
SIZE, DPI = (15, 7.5), 110  # of the picture, in inches
Results = dict[tuple[str, str, str], Trained]  # by tower, precision, and who: ours, theirs, or of what order


def main() -> None:
    """Prints the table, and draws the picture where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    picture = parser.parse_args().picture
    jax.config.update("jax_platforms", "cpu")
    results = run()
    console = rich.console.Console()
    console.print(table(results))
    if picture is not None:
        draw(results, picture)
        console.print(str(picture))


def run() -> Results:
    """Returns all trainings; shows which is going on."""
    found: Results = {}
    with tempfile.TemporaryDirectory() as folder, rich.progress.Progress() as progress:
        for tower in ARCHITECTURES:
            begun = start(tower, Path(folder) / tower, Path(folder) / "data")

            def shown(name: str, batches: list, tower: str = tower) -> Iterable:
                return progress.track(batches, description=f"{tower}, {name}")

            for dtype in PRECISIONS:
                for who, train in (("ours", ours), ("theirs", theirs)):
                    found[tower, dtype, who] = train(begun, dtype, shown(f"{dtype}, {who}", begun.batches))
            for who, seed in ORDERS.items():
                batches = in_another_order(begun.batches, seed)
                found[tower, "float32", who] = ours(begun, "float32", shown(f"float32, {who}", batches))
    return found


def table(results: Results) -> rich.table.Table:
    """Returns what the trainings have come to, a row for each two of them."""
    shown = rich.table.Table(title=f"{STEPS} steps of the same batches from the same weights")
    for heading in ("", "losses apart, at most, first steps", f"{STEPS} steps", "final loss", "top-1, %"):
        shown.add_column(heading, justify="right" if heading else "left")
    for tower in ARCHITECTURES:
        for dtype in PRECISIONS:
            shown.add_row(*_row(f"{tower}, {dtype}: ours, OpenCLIP's", results, (tower, dtype, "ours"), "theirs"))
        for who in ORDERS:
            shown.add_row(*_row(f"{tower}, float32: ours, rows in {who}", results, (tower, "float32", "ours"), who))
        loss, accuracy = ends_by_rounding([results[tower, "float32", who] for who in ("ours", *ORDERS)])
        ends = f"{loss.middle:.5f} ± {loss.margin:.1g}", f"{100 * accuracy.middle:.2f} ± {100 * accuracy.margin:.2f}"
        shown.add_row(f"{tower}, float32: one more of ours, by 95 %", "", "", *ends, end_section=True)
    return shown


def _row(name: str, results: Results, key: tuple[str, str, str], beside: str) -> list[str]:
    one, other = results[key], results[*key[:2], beside]
    losses = apart(one, other)
    bar = BARS.get(key[:2])
    first = "" if bar is None else f"{losses[: bar.steps].max():.1e} in {bar.steps} (bar {bar.loss:.0e})"
    ends = (f"{one.final_loss:.5f}, {other.final_loss:.5f}", f"{100 * one.accuracy:.2f}, {100 * other.accuracy:.2f}")
    return [name, first, f"{losses.max():.1e}", *ends]


def draw(results: Results, path: Path) -> None:
    """Draws the losses of both over steps for each model and precision, and how far they are apart."""
    figure = Figure(figsize=SIZE, layout="constrained")
    rows = figure.subplots(len(ARCHITECTURES), 1 + len(PRECISIONS), sharex=True, width_ratios=(1, 1, 1, 1.6))
    for tower, (*curves, difference) in zip(ARCHITECTURES, rows, strict=True):
        for dtype, axes in zip(PRECISIONS, curves, strict=True):
            _draw_losses(axes, results, tower, dtype)
        curves[0].set_ylabel(f"{tower}\nloss", fontsize=12)
        for axes in curves[1:]:
            axes.sharey(curves[0])
            axes.tick_params(labelleft=False)
        _draw_differences(difference, results, tower)
    for axes in rows[-1]:
        axes.set_xlabel("step")
    figure.savefig(path, dpi=DPI)


def _draw_losses(axes: Axes, results: Results, tower: str, dtype: str) -> None:
    one, other = results[tower, dtype, "ours"], results[tower, dtype, "theirs"]
    axes.plot(other.losses, color=COLORS[dtype], linewidth=4, alpha=0.35, label="OpenCLIP")
    axes.plot(one.losses, color="black", linewidth=0.9, label="clip_jax")
    axes.set_title(f"{tower}, {dtype}")
    top = [f"{name} {100 * x.accuracy:.1f} %" for name, x in (("OpenCLIP", other), ("clip_jax", one))]
    axes.text(0.97, 0.62, "\n".join(["held out, top-1:", *top]), transform=axes.transAxes, ha="right", va="center")
    axes.legend(loc="upper right", frameon=False)
    axes.grid(alpha=0.25)


def _draw_differences(axes: Axes, results: Results, tower: str) -> None:
    """Draws how far losses have been apart so far, relative to theirs; the same of ours with the rows of batches in
    another order, which is rounding alone; and the bars."""
    for dtype in PRECISIONS:
        axes.plot(_apart(results, tower, dtype, "theirs"), color=COLORS[dtype], linewidth=1.8, label=dtype)
        if (bar := BARS.get((tower, dtype))) is not None:
            label = f"the bar in {dtype}"
            axes.plot([0, bar.steps], [bar.loss] * 2, color=COLORS[dtype], linewidth=5, alpha=0.45, label=label)
    rounding = _apart(results, tower, "float32", next(iter(ORDERS)))
    axes.plot(
        rounding,
        ":",
        color="black",
        linewidth=1.4,
        label="float32, clip_jax beside itself\nwith batches' rows reordered",
    )
    axes.set_yscale("log")
    axes.set_ylim(1e-17, 10)
    axes.set_title(f"{tower}: relative difference of losses, the largest so far")
    if tower == next(iter(ARCHITECTURES)):
        axes.legend(loc="center right", bbox_to_anchor=(1, 0.36), fontsize=9)
    axes.grid(alpha=0.25)


def _apart(results: Results, tower: str, dtype: str, beside: str) -> np.ndarray:
    """Returns the largest difference up to each step, for a logarithmic axis: none is as small as float64 can tell."""
    losses = apart(results[tower, dtype, "ours"], results[tower, dtype, beside])
    return np.maximum(np.maximum.accumulate(losses), 1e-16)


if __name__ == "__main__":
    main()
