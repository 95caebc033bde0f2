"""Training pairs from tar shards, JPEGs to crops and captions to ids, on one core beside OpenCLIP's own loader."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import input_pipeline
import peers
from peers import OURS
from side_by_side import Row

PEER = "OpenCLIP"
JOBS = ((256, 1.4, 32), (640, 2.0, 12))  # pixels of the shorter side, the bar, batches of 64
QUICK = ((256, 1.4, 4),)
EPOCHS = {OURS: input_pipeline.epoch_ours, PEER: input_pipeline.epoch_theirs}


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields a row for each size of pictures."""
    epochs, gaps = peers.available(_epoch, EPOCHS)
    for short, bar, batches in QUICK if quick else JOBS:
        seconds = input_pipeline.decoding_seconds(folder, short, batches, 2 if quick else 5, list(epochs.values()))
        taken = dict(zip(epochs, seconds, strict=True))
        yield Row(f"{64 * batches:,} pairs, JPEGs of {short} px", taken, bar=bar, gaps=gaps)


def _epoch(who: str) -> input_pipeline.Epoch:
    if who == PEER:
        peers.module(PEER)
        if importlib.util.find_spec("webdataset") is None:
            raise peers.Gap("webdataset is not installed")
    return EPOCHS[who]
