"""The memory that converting a model takes, against the size of its file.

    python benchmarks/conversion_memory.py [--variant=ViT-bigG-14] [--dtype=float16]

Hardware: any CPU, on Linux; three times the file's size on the disk, in the folder for temporary files (TMPDIR).
Time: for ViT-bigG-14 in float16 (2.5 billion parameters, 5 GB) three minutes on 2 cores, in float32 twice that; it is
the disk's.
A model goes through all formats that can hold it, and back to ours, which must be what it was, byte for byte. Each
conversion runs in a process of its own; its memory is the most it ever had, with all that it imports and the pages of
the files that it reads.
"""

import argparse
import filecmp
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rich.console
import rich.progress
import rich.table

from clip_jax import pretrained
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.weights import bundle
from clip_jax.weights.mapping import flatten
from clip_jax.weights.streaming import Lazy

BAR = 1.3  # memory / file
MEGABYTE = 1 << 20


def make(variant: str, dtype: str, target: Path) -> None:
    """Writes a model of our format, made of the same million random numbers again and again."""
    shapes = flatten(Definition(VARIANTS[variant]).shapes())
    numbers = np.random.default_rng(0).standard_normal(1_000_003, np.float32).astype(dtype)

    def arrays(paths):
        for path in paths:
            yield np.resize(numbers, shapes[path].shape)

    specs = {path: np.broadcast_to(numbers[0], like.shape) for path, like in shapes.items()}
    lazy = Lazy(specs, [([path], arrays) for path in shapes])
    bundle.write_folder(target, bundle.Bundle(VARIANTS[variant], lazy, variant, "random"))


def route(variant: str) -> list[str]:
    """Returns the formats that a model goes through, of those that can hold it, from ours back to ours."""
    holds = [name for name in pretrained.HOLDS if pretrained.can_hold(name, VARIANTS[variant])]
    return [*holds, "clip_jax"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = sorted(name for name, known in VARIANTS.items() if known.tokenize.kind == "clip")
    parser.add_argument("--variant", default="ViT-bigG-14", choices=names, metavar="NAME")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # what the processes are started with
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measured(*flags.one)))
        return
    console, parameters = rich.console.Console(), [f"--variant={flags.variant}", f"--dtype={flags.dtype}"]
    with tempfile.TemporaryDirectory() as temporary:
        first = source = Path(temporary) / "first"
        with console.status(f"writing a {flags.variant} of random numbers, {flags.dtype}"):
            make(flags.variant, flags.dtype, first)
        size = size_of(first)
        table = rich.table.Table(title=f"{flags.variant}, {flags.dtype}: a file of {size / MEGABYTE:,.0f} MB")
        for heading in ("", "at most", "of it before", "at most / file", f"≤ {BAR}", "time"):
            table.add_column(heading, justify="right" if heading else "left")
        was = "clip_jax"
        for i, format_ in enumerate(route(flags.variant)):
            target, name = Path(temporary) / f"{i}.pt", f"{was} → {format_}"
            command = [sys.executable, __file__, *parameters, "--one", format_, str(source), str(target)]
            peak, before, seconds = watched(command, target, size, name, console)
            verdict = "yes" if peak <= BAR * size else "[bold red]NO[/]"
            megabytes = [f"{n / MEGABYTE:,.0f} MB" for n in (peak, before)]
            table.add_row(name, *megabytes, f"{peak / size:.2f}", verdict, f"{seconds:.1f} s")
            if source != first:
                remove(source)
            source, was = target, format_
        same = filecmp.cmp(first / bundle.TENSORS, source / bundle.TENSORS, shallow=False)
    console.print(table)
    console.print(f"the last is the first byte for byte: {'yes' if same else '[bold red]NO[/]'}")


def watched(command: list[str], target: Path, size: int, name: str, console: rich.console.Console) -> list[float]:
    """Returns what a process measures, after showing how far it has come."""
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    with (
        rich.progress.Progress(*columns, console=console, transient=True) as progress,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        task = progress.add_task(name, total=size)
        while process.poll() is None:
            progress.update(task, completed=min(size, being_written(target)))
            time.sleep(0.2)
        output = process.stdout.read()
    if process.returncode:
        sys.exit(f"{name} failed")
    return json.loads(output.splitlines()[-1])


def measured(format_: str, source: str | Path, target: str | Path) -> list[float]:
    """Returns the most memory that this process ever has, and had before, in bytes, and the conversion's seconds."""
    before, start = peak_memory(), time.perf_counter()
    pretrained.convert(source, format_, Path(target))
    return [peak_memory(), before, time.perf_counter() - start]


def peak_memory() -> int:
    """Returns the most memory that this process ever had, in bytes (`ru_maxrss` would count the parent's, too)."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def size_of(path: Path) -> int:
    """Returns the size of a model's file of tensors."""
    return max(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def being_written(target: Path) -> int:
    """Returns how many bytes lie on the disk for a file or folder, that of its temporary included."""
    files = target.rglob("*") if target.is_dir() else target.parent.glob(f".{target.stem}.*")
    return sum(512 * file.stat().st_blocks for file in files)


def remove(path: Path) -> None:
    for file in [*path.iterdir()] if path.is_dir() else [path]:
        file.unlink()


if __name__ == "__main__":
    main()
