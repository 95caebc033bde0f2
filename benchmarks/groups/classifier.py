"""The zero-shot classifier of 1,000 classes × 8 templates beside OpenCLIP's own builder."""

from collections.abc import Iterator
from pathlib import Path

import evaluation
from side_by_side import Row


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields a row: ViT-B/32's text tower, half as wide."""
    classes = 100 if quick else evaluation.CLASSES
    taken, gaps = evaluation.classifier(1, folder / "model", classes)
    yield Row(f"{classes:,} classes × {len(evaluation.TEMPLATES)} templates", taken, bar=2.0, gaps=gaps)
