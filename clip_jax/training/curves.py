"""The curves of runs in one picture: a colour a run; what was logged is faint, and over it lies its course."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from clip_jax.errors import UserError
from clip_jax.files import AnyPath, read_json, whole
from clip_jax.training.feed import total
from clip_jax.training.step_lines import read_lines
from clip_jax.typing import Float
from clip_jax.workdir import Workdir

COLORS = mpl.colormaps["tab10"].colors
STYLES = ("-", "--", ":", "-.")  # of a panel's curves
POINTS = 600  # of a smoothed curve, at most
REACH = 0.04  # of a curve to either side is what a smoothed value is made of
LOG_FROM = 3.0  # from the largest to the smallest: less is easier read on a plain axis
HEADLINES = ("acc1", "image_retrieval_recall@1", "text_retrieval_recall@1")  # of the results that are drawn
RESULTS = 5  # files of results that are drawn
INCHES, DPI = (16, 10), 100
PLAIN = FuncFormatter(lambda value, _: f"{value:.5g}")
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.5g} %")


class Curve(NamedTuple):
    """Values over steps."""

    steps: Float[np.ndarray, " N"]
    values: Float[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True)
class Panel:
    """What is drawn together."""

    title: str
    fields: dict[str, str]  # of a line of metrics.jsonl, and how they are told apart
    axis: str = "plain"  # or log, share
    course: str = "mean"  # of a value's surroundings; or median: compilation and checkpoints take their time; or itself


TOWERS = ("image", "text")
ACCURACIES = {"image_to_text_accuracy": "image → text", "text_to_image_accuracy": "text → image"}
PANELS = (
    Panel("loss", {"loss": ""}, "log"),
    Panel("in-batch accuracy", ACCURACIES, "share"),
    Panel("learning rate", {"learning_rate": ""}, course="itself"),
    Panel("logit scale", {"logit_scale": ""}, course="itself"),
    Panel("gradient norm", {f"gradient_norm_{tower}": f"{tower} tower" for tower in TOWERS}, "log"),
    Panel("parameter norm", {f"parameter_norm_{tower}": f"{tower} tower" for tower in TOWERS}, course="itself"),
    Panel("pairs a second", {"pairs_per_second": ""}, course="median"),
    Panel("MFU", {"mfu": ""}, "share", course="median"),
    Panel("waiting for data", {"data_wait": ""}, "share", course="median"),
    Panel("device memory at peak, bytes", {"device_memory": ""}, course="itself"),
)
LEFT_OUT = "pairs left out so far"
INCIDENTS = {"skipped": ("x", "update skipped"), "spike": ("^", "loss jumped")}  # and their signs beneath the loss


class Run(NamedTuple):
    """What is known of a run."""

    name: str
    about: str
    lines: list[dict[str, Any]]
    incidents: list[dict[str, Any]]
    results: dict[str, dict[str, Curve]]  # by the name of the file, by metric

    def curve(self, field: str) -> Curve:
        """Returns a field's finite values; those that are not are null in a line."""
        found = [(line["step"], line[field]) for line in self.lines if line.get(field) is not None]
        return Curve(*np.array(found, float).reshape(-1, 2).T)

    def left_out(self) -> Curve:
        """Returns how many pairs were left out until each step."""
        counts = np.cumsum([total(line.get("bad_records", {})) for line in self.lines])
        return Curve(np.array([line["step"] for line in self.lines], float), counts.astype(float))


def read_run(path: AnyPath, name: str) -> Run:
    """Returns what a workdir says of its run.

    Raises:
        UserError: it is none, or nothing is logged yet.
    """
    folder = Workdir(path)
    if not folder.is_claimed():
        raise UserError(f"{path} is not a run's folder: it has no config.json; name a --workdir of train.py")
    if not (lines := _lines(folder.metrics_file)):
        raise UserError(f"{path} has no metrics yet: its run has not come to its first step")
    return Run(name, _about(folder, lines[-1]), lines, _lines(folder.incidents_file), _results(folder))


def _lines(path: AnyPath) -> list[dict[str, Any]]:
    """Returns the lines of a file; none of one that is not there."""
    try:
        return read_lines(path) if path.exists() else []
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _about(folder: Workdir, last: dict[str, Any]) -> str:
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4g}"
    return f"{folder.variant()}, batch {folder.config().data.global_batch:,}, step {last['step']:,}, loss {loss}"


def _results(folder: Workdir) -> dict[str, dict[str, Curve]]:
    """Returns the metrics in eval/<step>/*.json over steps."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for step, files in folder.evaluations().items():
        for file in files:
            metrics = read_json(file)["metrics"]
            for metric in [name for name in HEADLINES if name in metrics] or list(metrics)[:2]:
                found.setdefault(file.stem, {}).setdefault(metric, []).append((step, metrics[metric]))
    return {
        name: {metric: Curve(*np.array(points, float).T) for metric, points in metrics.items()}
        for name, metrics in found.items()
    }


def smoothed(curve: Curve, course: str) -> Curve:
    """Returns a curve's course: at each place the mean or the median of its surroundings, or the value itself.

    Towards the ends the surroundings shrink, so that a slope there is not taken for a step; to one half, for the noise.
    """
    if course == "itself":
        return curve
    average = {"mean": np.mean, "median": np.median}[course]
    parts = min(POINTS, len(curve.steps))
    steps = np.array([part.mean() for part in np.array_split(curve.steps, parts)])
    values = np.array([average(part) for part in np.array_split(curve.values, parts)])
    reach = round(REACH * parts)
    around = [min(max(i, reach // 2), max(parts - 1 - i, reach // 2), reach) for i in range(parts)]
    return Curve(steps, np.array([average(values[max(0, i - k) : i + k + 1]) for i, k in enumerate(around)]))


def draw(runs: Sequence[Run], path: AnyPath) -> None:
    """Draws all that the runs have."""
    drawers = list(_panels(runs))
    columns = math.ceil(math.sqrt(len(drawers)))
    rows = math.ceil(len(drawers) / columns)
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    for place, drawer in enumerate(drawers, 1):
        axes = figure.add_subplot(rows, columns, place)
        drawer(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if place > len(drawers) - columns:
            axes.set_xlabel("step")
    handles = [Line2D([], [], color=color, linewidth=3) for color, _ in zip(COLORS, runs, strict=False)]
    labels = [f" {run.name}: {run.about}" for run in runs]  # a space: matplotlib leaves out what begins with _
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=2 if len(runs) > 3 else 1, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    if (more := len(_result_names(runs)) - RESULTS) > 0:
        figure.supxlabel(f"not drawn of eval/: {more}", x=0.99, ha="right", fontsize=9)
    with whole(path) as temporary:
        figure.savefig(temporary)


def _panels(runs: Sequence[Run]) -> Iterator[Any]:
    """Yields what draws each panel into its axes."""
    for panel in PANELS:
        if any(field in line for run in runs for line in run.lines for field in panel.fields):
            yield lambda axes, panel=panel: _draw_panel(axes, runs, panel)
    if any(run.left_out().values[-1] for run in runs):
        yield lambda axes: _draw_left_out(axes, runs)
    for name in _result_names(runs)[:RESULTS]:
        yield lambda axes, name=name: _draw_results(axes, runs, name)


def _result_names(runs: Sequence[Run]) -> list[str]:
    return sorted({name for run in runs for name in run.results})


def _draw_panel(axes: Axes, runs: Sequence[Run], panel: Panel) -> None:
    seen = []  # what the axis has to have room for
    for run, color in zip(runs, COLORS, strict=False):
        for field, style in zip(panel.fields, STYLES, strict=False):
            curve = run.curve(field)
            if not len(curve.steps):
                continue
            course = smoothed(curve, panel.course)
            if panel.course != "itself":
                axes.plot(*curve, style, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(*course, style, color=color, linewidth=1.6, marker="." if len(curve.steps) == 1 else "")
            seen.append((course if panel.course == "median" else curve).values)
    _scale(axes, panel.axis, np.concatenate(seen) if seen else np.zeros(1))
    axes.set_title(panel.title, fontsize=11)
    _tell_apart(axes, list(panel.fields.values()))
    if "loss" in panel.fields:
        _mark(axes, runs)


def _scale(axes: Axes, kind: str, values: Float[np.ndarray, " N"]) -> None:
    """Gives the values their axis."""
    positive = values[values > 0]
    if kind == "share":
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_ylim(0, max(1.05 * values.max(), 0.01))
    elif kind == "log" and len(positive) and positive.max() > LOG_FROM * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif len(positive) and positive.max() >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.yaxis.set_major_formatter(PLAIN)


def _tell_apart(axes: Axes, labels: Sequence[str]) -> None:
    """Says which line is which, where a panel has several."""
    if len(labels) > 1:
        lines = [Line2D([], [], color="gray", linestyle=style) for style in STYLES[: len(labels)]]
        axes.legend(lines, labels, fontsize=8, frameon=False)


def _mark(axes: Axes, runs: Sequence[Run]) -> None:
    """Puts signs beneath the loss where something happened."""
    handles = {}
    for height, (kind, (sign, label)) in enumerate(INCIDENTS.items()):
        for run, color in zip(runs, COLORS, strict=False):
            if steps := [incident["step"] for incident in run.incidents if incident["kind"] == kind]:
                place = axes.get_xaxis_transform()  # steps across, shares of the panel upwards
                axes.plot(steps, [0.03 + 0.05 * height] * len(steps), sign, color=color, transform=place, markersize=5)
                handles[label] = Line2D([], [], color="gray", linestyle="", marker=sign)
    if handles:
        axes.legend(handles.values(), handles.keys(), fontsize=8, frameon=False)


def _draw_left_out(axes: Axes, runs: Sequence[Run]) -> None:
    for run, color in zip(runs, COLORS, strict=False):
        axes.plot(*run.left_out(), color=color, linewidth=1.6, drawstyle="steps-post")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(LEFT_OUT, fontsize=11)


def _draw_results(axes: Axes, runs: Sequence[Run], name: str) -> None:
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.results.get(name, {})))[: len(STYLES)]
    for run, color in zip(runs, COLORS, strict=False):
        for metric, style in zip(metrics, STYLES, strict=False):
            if curve := run.results.get(name, {}).get(metric):
                axes.plot(*curve, style, color=color, linewidth=1.6, marker="o", markersize=4)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))  # no axis of shares goes to 102 %
    axes.set_title(name if len(metrics) > 1 else f"{metrics[0]}: {name}", fontsize=11, parse_math=False)
    _tell_apart(axes, metrics)


def report(workdirs: Sequence[AnyPath], output: AnyPath | None = None) -> AnyPath:
    """Draws the runs' curves, and returns where.

    Raises:
        UserError: one of them is no run's folder or has nothing to draw, or there are too many.
    """
    if len(workdirs) > len(COLORS):
        raise UserError(f"{len(workdirs)} runs are more than can be told apart by colour; name {len(COLORS)} at most")
    names = [path.resolve().name for path in workdirs]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, workdirs, strict=True)]
    runs = [read_run(path, name) for path, name in zip(workdirs, names, strict=True)]
    path = output or (Workdir(workdirs[0]).curves if len(workdirs) == 1 else Path("curves.png"))
    draw(runs, path)
    return path
