"""Imports, and ViT-B/32 read from a file: time, and the most memory that the process has had.

Run by `bench.py`; with a peer's name and a path, it is the process that loads.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import peers
from groups import models
from side_by_side import OURS, Row

ROUNDS = {True: 2, False: 5}  # by whether it is to be quick


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields the time until a process has imported, that until it has loaded, and its memory."""
    paths = models.write_all(models.drawn("ViT-B/32"), folder)
    found: dict[str, list[list[float]]] = {}
    gaps: dict[str, str] = {}
    for n in range(ROUNDS[quick] + 1):  # the first reads the files into the system's memory
        for who in (OURS, *peers.MODULES):
            if who in gaps:
                continue
            taken = _alone(who, paths[who])
            if isinstance(taken, str):
                gaps[who] = taken
            elif n:
                found.setdefault(who, []).append(taken)
    for i, (job, unit) in enumerate((("import", "s"), ("load ViT-B/32", "s"), ("import and load: peak memory", "MB"))):
        yield Row(job, {who: [taken[i] for taken in rounds] for who, rounds in found.items()}, unit, gaps=gaps)


def _alone(who: str, path: Path) -> list[float] | str:
    """Returns [seconds to import, to load, MB] of a process; or why it cannot."""
    command = [sys.executable, "-m", "groups.start", who, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr.splitlines()[-1]


def _main(who: str, path: Path) -> None:
    start = time.perf_counter()
    imported = models.imported(who)
    between = time.perf_counter()
    loaded = models.load(who, imported, path)
    end = time.perf_counter()
    del loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([between - start, end - between, peak]))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
