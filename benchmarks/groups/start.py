"""Imports, and ViT-B/32 read from a file: time, and the most memory that the process has had."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peers
from groups import models
from peers import OURS
from side_by_side import Row

ROUNDS = {True: 2, False: 5}  # by whether it is to be quick
LOADING = Path(__file__).parents[1] / "loading.py"


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields the time until a process has imported, that until it has loaded, and its memory."""
    paths = models.write_all(models.drawn("ViT-B/32"), folder)
    found: dict[str, list[list[float]]] = {}
    gaps: dict[str, str] = {}
    for n in range(ROUNDS[quick] + 1):  # the first reads the files into the system's memory
        for who in (OURS, *peers.MODULES):
            if who in gaps:
                continue
            try:
                taken = _alone(who, paths[who])
            except peers.Gap as gap:
                gaps[who] = str(gap)
                continue
            if n:
                found.setdefault(who, []).append(taken)
    for i, (job, unit) in enumerate((("import", "s"), ("load ViT-B/32", "s"), ("import and load: peak memory", "MB"))):
        yield Row(job, {who: [taken[i] for taken in rounds] for who, rounds in found.items()}, unit, gaps=gaps)


def _alone(who: str, path: Path) -> list[float]:
    """Returns [seconds to import, to load, MB] of a process.

    Raises:
        peers.Gap: the peer is not installed.
    """
    done = subprocess.run([sys.executable, LOADING, who, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{LOADING.name} {who} {path} ended with {done.returncode}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if isinstance(found, str):
        raise peers.Gap(found)
    return found
