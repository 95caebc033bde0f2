"""Pictures of what is behind the numbers: confusion matrices, best matches for a few captions, curves, thumbnails."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from clip_jax.data import storage, transforms
from clip_jax.data.problems import BadRecord
from clip_jax.data.sources import Source
from clip_jax.errors import UserError
from clip_jax.evaluation.breakdown import Calibration
from clip_jax.evaluation.retrieval import Ranks
from clip_jax.evaluation.tasks import Matches, Result
from clip_jax.evaluation.zero_shot import Predictions
from clip_jax.files import AnyPath, whole
from clip_jax.typing import Int

NAMED_CLASSES = 60  # with more there is no room for names and counts
DRAWN_CLASSES = 2000  # with more a class has no pixel
RIGHT, WRONG = "#2a9d4a", "#c63b3b"
MODELS = {"": "#2563a8", "A": "#2563a8", "B": "#c2700e"}  # by the letter of a model of two; "" is one alone
THUMBNAIL = 160  # pixels of the longer side, at most
DRAWN_EXACTLY = 64  # pixels of the longer side, up to which a thumbnail is as the image is


def of(source: Source, task: str, result: Result) -> dict[str, Callable[[AnyPath], None]]:
    """Returns what draws the pictures of a result into files, by the word that is added to their names."""
    name, found = f"{source.name}:{source.split}", {}
    if isinstance(result.found, Predictions) and result.found.classes <= DRAWN_CLASSES:
        labels, best = result.found.labels, result.found.best[:, 0]
        classnames = result.classnames or tuple(map(str, range(result.found.classes)))
        title = f"{name}, {task}: {100 * (labels == best).mean():.1f} % right"
        found["confusion"] = lambda path: confusion_matrix(path, labels, best, classnames, title)
    if result.matches:
        found["matches"] = lambda path: best_matches(path, result.matches, source, f"nearest images, {name}")
    return found


def confusion_matrix(
    path: AnyPath,
    labels: Int[np.ndarray, " B"],
    predicted: Int[np.ndarray, " B"],
    classnames: Sequence[str],
    title: str,
) -> None:
    """Draws how often each class (row) was taken for which (column); the diagonal is right."""
    _save(_confusion(labels, predicted, classnames, title), path)


def confusion_png(labels: Int[np.ndarray, " B"], predicted: Int[np.ndarray, " B"], classnames: Sequence[str]) -> bytes:
    """Returns the same as a PNG file's bytes, without a title."""
    return _png(_confusion(labels, predicted, classnames, ""), dpi=80)


def _confusion(
    labels: Int[np.ndarray, " B"], predicted: Int[np.ndarray, " B"], classnames: Sequence[str], title: str
) -> Figure:
    n = len(classnames)
    side = min(2.5 + 0.5 * n, 20)  # inches
    counts = np.zeros((n, n), int)
    np.add.at(counts, (labels, predicted), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(side, side - 0.5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, parse_math=False)
    if n <= NAMED_CLASSES:
        axes.set_xticks(range(n), classnames, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(n), classnames, parse_math=False)
        for row, column in zip(*np.nonzero(counts), strict=True):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=shade, fontsize=9)
    return figure


def best_matches(path: AnyPath, rows: Sequence[Matches], source: Source, title: str) -> None:
    """Draws a row of images for each caption; a frame says whether each is right."""
    columns = max(len(row.images) for row in rows)
    figure = Figure(figsize=(1.2 * columns + 0.3, 1.55 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for part, row in zip(np.atleast_1d(figure.subfigures(len(rows), 1)), rows, strict=True):
        part.suptitle(f"“{row.caption}”", fontsize=9, x=0.01, ha="left", parse_math=False)
        for axes, index, right in zip(part.subplots(1, columns), row.images, row.right, strict=False):
            small = thumbnail_of(source, index)
            if isinstance(small, Thumbnail):
                axes.imshow(Image.open(io.BytesIO(small.data)).convert("RGB"))
            else:
                axes.text(0.5, 0.5, "gone", ha="center", va="center")
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set(color=RIGHT if right else WRONG, linewidth=3)
    _save(figure, path)


def reliability(curves: Mapping[str, Calibration]) -> bytes:
    """Returns a PNG of how often each model is right by how sure it is, and below of how many images that is so.

    A model is told by a letter, or "" where it is alone.
    """
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
    for letter, curve in curves.items():
        some, colour = curve.images > 0, MODELS[letter]
        upper.plot(curve.confidence[some], curve.right[some], "o-", color=colour, markersize=4, label=letter)
        edges = np.linspace(0, 1, len(curve.images) + 1)
        lower.stairs(100 * curve.images / curve.images.sum(), edges, color=colour, fill=True, alpha=0.45)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
    lower.set(xlabel="confidence", ylabel="images, %")
    _quiet(upper, lower, legend=len(curves) > 1)
    return _png(figure)


def rank_histogram(ranks: Mapping[str, Ranks]) -> bytes:
    """Returns a PNG of the places at which the right ones are, for both directions; the bars double in width."""
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, of, title in zip(both, Ranks._fields, ("a text's own image", "an image's own text"), strict=True):
        bins = {letter: np.frexp(getattr(one, of))[1] for letter, one in ranks.items()}
        last, width = max(int(found.max()) for found in bins.values()), 0.8 / len(ranks)
        for i, (letter, found) in enumerate(bins.items()):
            shares = 100 * np.bincount(found, minlength=last + 1) / len(found)
            places = np.arange(last + 1) + width * (i - (len(ranks) - 1) / 2)
            axes.bar(places, shares, width, color=MODELS[letter], label=letter)
        names = ["1", "2", *(f"{2 ** (i - 1) + 1:,}–{2**i:,}" for i in range(2, last + 1))]
        axes.set_xticks(range(last + 1), names[: last + 1], rotation=45 if last > 6 else 0, fontsize=9)
        axes.set(title=title, xlabel="place")
    both[0].set_ylabel("share, %")
    _quiet(*both, legend=len(ranks) > 1)
    return _png(figure)


def _quiet(*several: Axes, legend: bool) -> None:
    """Takes away what says nothing."""
    for axes in several:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    if legend:
        several[0].legend(frameon=False)


class Thumbnail(NamedTuple):
    """A small image, encoded."""

    data: bytes
    format: str  # "png" or "jpeg"
    width: int
    height: int


def thumbnail_of(source: Source, index: int) -> "Thumbnail | str":
    """Returns an image of a data set in few bytes, or why it cannot be read any more."""
    try:
        return thumbnail(storage.patiently(lambda: source[index]).image)
    except (BadRecord, OSError, UserError) as error:
        return f"image {index:,} cannot be read: {error}"


def thumbnail(image: bytes) -> Thumbnail:
    """Returns an image in few bytes: what is small as it is, what is large made small.

    Raises:
        OSError: it is none, or damaged.
    """
    small = transforms.on_white(transforms.decode(image))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file, format = io.BytesIO(), "png" if max(small.size) <= DRAWN_EXACTLY else "jpeg"
    small.save(file, format.upper(), **({"optimize": True} if format == "png" else {"quality": 80}))
    return Thumbnail(file.getvalue(), format, *small.size)


def _png(figure: Figure, dpi: int = 110) -> bytes:
    """Returns a figure as a file's bytes, of few colours: a page has many."""
    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _save(figure: Figure, path: AnyPath) -> None:
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=120)
