"""Imports a project and reads a model's file, in a process that has nothing else: `groups/start.py` starts it.

    python benchmarks/loading.py WHO PATH

Prints JSON: [seconds to import, seconds to load, MB that the process has had at most]; or why it cannot be measured.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import peers

with contextlib.suppress(ImportError):
    import oracles  # noqa: F401 (its pytest is nobody's to pay for)


def main(who: str, path: str) -> None:
    start = time.perf_counter()
    try:
        package = peers.imported(who)
    except peers.Gap as gap:
        print(json.dumps(str(gap)))
        return
    between = time.perf_counter()
    model = peers.load(who, package, Path(path))
    end = time.perf_counter()
    assert model is not None
    # Not getrusage's: that begins with what the process that has started this one has had.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps([between - start, end - between, 1024 * peak / 1e6]))


if __name__ == "__main__":
    main(*sys.argv[1:])
