"""What we do beside what the peers do, on this machine: every group of rows, or some.

    make bench        or: python benchmarks/bench.py [--quick] [--only=encoding,loss] [--output=FOLDER]

Hardware: any CPU, for `gpu.py` see there; peers are measured where they are installed (`make test` installs them).
Time: an hour or more on 2 cores, ten minutes with --quick, which has fewer rows and rounds.
In FOLDER (runs/bench) it leaves bench.json and bench.png; with --only they keep the other groups that they have.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import rich.console
import rich.progress
from side_by_side import Row, draw, table, to_json

# By name, what is measured; each in a process of its own, so that none warms up another.
GROUPS = ("host", "encoding", "training", "runs", "start", "loss", "checkpoints", "loader", "classifier")
FILE, PICTURE = "bench.json", "bench.png"
PACKAGES = ("jax", "flax", "torch", "open_clip_torch", "clip-anytorch", "transformers")


def main() -> None:
    """Prints the tables, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)  # in a process of its own
    asked = parser.parse_args()
    if asked.group is not None:
        measure(asked.group, quick=asked.quick)
        return
    names = asked.only.split(",") if asked.only else list(GROUPS)
    if unknown := [name for name in names if name not in GROUPS]:
        parser.error(f"--only={unknown[0]} is none of {', '.join(GROUPS)}")
    asked.output.mkdir(parents=True, exist_ok=True)
    console, machine = rich.console.Console(width=150), where()
    groups, failed = measured_before(asked.output / FILE) if asked.only else {}, []
    with rich.progress.Progress(*rich.progress.Progress.get_default_columns(), console=console) as progress:
        bar = progress.add_task("", total=len(names))
        for name in names:
            progress.update(bar, description=name)
            try:
                groups[name] = of_group(
                    name, quick=asked.quick, shown=lambda row: progress.update(bar, description=row)
                )
                console.print(table(name, groups[name]))
            except Failed as error:  # what others have found is not lost
                failed.append(name)
                console.print(str(error), style="red", markup=False, highlight=False)
            progress.advance(bar)
            write(asked.output, machine, groups)
    console.print(f"{asked.output / FILE}, {asked.output / PICTURE}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def measured_before(file: Path) -> dict[str, list[Row]]:
    """Returns the groups that a file has: where some are measured anew, the others stay."""
    there = json.loads(file.read_text())["groups"] if file.exists() else {}
    return {name: [Row.of_json(row) for row in rows] for name, rows in there.items()}


def write(folder: Path, machine: dict[str, object], groups: dict[str, list[Row]]) -> None:
    """Writes both files, with what has been measured until now."""
    title = f"clip_jax beside its peers: {machine['processor']}, {machine['cores']} cores"
    for file, make in (
        (FILE, lambda path: path.write_text(to_json(machine, groups))),
        (PICTURE, lambda path: draw(path, title, groups)),
    ):
        partial = folder / f"partial-{file}"
        make(partial)
        partial.replace(folder / file)


class Failed(Exception):
    """A group ended before its last row; what it said."""


def of_group(name: str, *, quick: bool, shown) -> list[Row]:
    """Returns a group's rows, measured in a process of its own; `shown` is told of each.

    Raises:
        Failed: the process did not end well.
    """
    command = [sys.executable, __file__, f"--group={name}", *["--quick"] * quick]
    environment, rows = os.environ | {"JAX_PLATFORMS": "cpu"}, []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        for line in process.stdout:
            if line.startswith('{"job"'):
                rows.append(Row.of_json(json.loads(line)))
                shown(f"{name}: {rows[-1].job}")
        if process.wait():
            errors.seek(0)
            raise Failed(f"{name} ended with {process.returncode}:\n{errors.read()}")
    return rows


def measure(name: str, *, quick: bool) -> None:
    """Prints each row of a group as a line of JSON."""
    group = importlib.import_module(f"groups.{name}")
    with tempfile.TemporaryDirectory(prefix="clip_jax-") as folder:
        for row in group.rows(quick, Path(folder)):
            print(json.dumps(row.as_json()), flush=True)


def where() -> dict[str, object]:
    """Returns what was measured on."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": versions,
    }


if __name__ == "__main__":
    main()
