"""Pictures of what is behind the numbers: a confusion matrix, and the best matches for a few captions."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from clip_jax.files import AnyPath, whole
from clip_jax.typing import Int

NAMED_CLASSES = 60  # with more there is no room for names and counts
RIGHT, WRONG = "#2a9d4a", "#c63b3b"


class Matches(NamedTuple):
    """A caption and the images nearest to it, best first."""

    caption: str
    images: Sequence[bytes]
    right: Sequence[bool]


def confusion_matrix(
    path: AnyPath,
    labels: Int[np.ndarray, " B"],
    predicted: Int[np.ndarray, " B"],
    classnames: Sequence[str],
    title: str,
) -> None:
    """Draws how often each class (row) was taken for which (column); the diagonal is right."""
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
    _save(figure, path)


def best_matches(path: AnyPath, rows: Sequence[Matches], title: str) -> None:
    """Draws a row of images for each caption; a frame says whether each is right."""
    columns = max(len(row.images) for row in rows)
    figure = Figure(figsize=(1.2 * columns + 0.3, 1.55 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for part, row in zip(np.atleast_1d(figure.subfigures(len(rows), 1)), rows, strict=True):
        part.suptitle(f"“{row.caption}”", fontsize=9, x=0.01, ha="left", parse_math=False)
        for axes, data, right in zip(part.subplots(1, columns), row.images, row.right, strict=False):
            axes.imshow(Image.open(io.BytesIO(data)).convert("RGB"))
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set(color=RIGHT if right else WRONG, linewidth=3)
    _save(figure, path)


def _save(figure: Figure, path: AnyPath) -> None:
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=120)
