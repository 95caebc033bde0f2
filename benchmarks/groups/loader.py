"""Training pairs from tar shards, JPEGs to crops and captions to ids, on one core beside OpenCLIP's own loader."""

from collections.abc import Iterator
from pathlib import Path

import input_pipeline
from side_by_side import OURS, Row

JOBS = ((256, 1.4, 32), (640, 2.0, 12))  # pixels of the shorter side, the bar, batches of 64
QUICK = ((256, 1.4, 4),)


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields a row for each size of pictures."""
    for short, bar, batches in QUICK if quick else JOBS:
        ours, theirs = input_pipeline.decoding_seconds(folder, short, batches, rounds=2 if quick else 5)
        yield Row(f"{64 * batches:,} pairs, JPEGs of {short} px", {OURS: ours, "OpenCLIP": theirs}, bar=bar)
