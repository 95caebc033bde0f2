"""The data path: images a second beside OpenCLIP's own loader, and what indexes and long runs cost.

    make benchmark-data        or some rows: python benchmarks/input_pipeline.py [decoding] [index] [large] [memory]

Hardware: any CPU, two cores of it; "decoding" needs PyTorch and OpenCLIP (as `make test` installs them).
Time: a quarter of an hour on 2 cores, of which "memory" takes seven minutes.
Shards are webdataset's own, in a temporary folder of 1 GB; whatever is measured has a process of its own, and where
two are compared they take turns on one core, so that the ratio of their medians is of one run.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.progress
import rich.table
import training_shards

from clip_jax.architecture import Preprocess
from clip_jax.data import index_file, shard_index, storage, tar, transforms
from clip_jax.data.sources import open_source
from clip_jax.tokenizer import tokenize

ROUNDS = 7  # of the two that take turns; one more, the first, warms up
BATCH = 64  # OpenCLIP's default
LAION = shard_index.Choice(("jpg", "jpeg", "png", "webp"), ("txt",), 1, 2**31)  # what `open_source` looks for
STEPS, WARM_STEPS, EVERY = 50_000, 2_000, 1_000


class Row(NamedTuple):
    """A row of the table: what was found, its bar, and OpenCLIP's figure where there is one."""

    name: str
    found: str
    bar: str = ""
    kept: bool | None = None
    theirs: str = ""
    ratio: str = ""


def main() -> None:
    table = rich.table.Table(title=f"The data path on {len(os.sched_getaffinity(0))} cores")
    for heading in ("", "clip_jax", "OpenCLIP", "ratio", "bar", "kept"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in sys.argv[1:] or ROWS:
        with tempfile.TemporaryDirectory(prefix="clip_jax-") as folder:
            for row in ROWS[name](Path(folder)):
                kept = "" if row.kept is None else "yes" if row.kept else "NO"
                table.add_row(row.name, row.found, row.theirs, row.ratio, row.bar, kept)
    rich.console.Console(width=120).print(table)


def process() -> concurrent.futures.ProcessPoolExecutor:
    """Returns a new process that calls what is submitted to it."""
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def alone(call: Callable, *arguments: Any) -> Any:
    """Returns what a call returns in a new process."""
    with process() as pool:
        return pool.submit(call, *arguments).result()


# Images a second of one core, JPEGs to crops and captions to ids.


def decoding(folder: Path) -> Iterator[Row]:
    for short, bar, batches in ((256, 1.4, 32), (640, 2.0, 12)):
        seconds = decoding_seconds(folder, short, batches, ROUNDS, (epoch_ours, epoch_theirs))
        rates = [[BATCH * batches / taken for taken in of_side] for of_side in seconds]
        found, other = (statistics.median(of_side) for of_side in rates)
        ratios = [a / b for a, b in zip(*rates, strict=True)]
        name, spread = f"JPEGs of {short} px, images/s of a core", f"{min(ratios):.2f}-{max(ratios):.2f}"
        ratio = found / other
        yield Row(name, f"{found:.0f}", f">= {bar} x", ratio >= bar, f"{other:.0f}", f"{ratio:.2f} ({spread})")


Epoch = Callable[[Path, int], float]  # of the shards in a folder, with so many records: its seconds


def decoding_seconds(
    folder: Path, short: int, batches: int, rounds: int, epochs: Sequence[Epoch]
) -> list[tuple[float, ...]]:
    """Returns the seconds of epochs over the same shards, in turns, each in a process of its own that stays; a first
    round warms up."""
    place, records = folder / str(short), BATCH * batches
    place.mkdir()
    training_shards.write(place, 4, records // 4, short, 256)
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(process()) for _ in epochs]
        taken = [
            [pool.submit(epoch, place, records).result() for pool, epoch in zip(pools, epochs, strict=True)]
            for _ in range(rounds + 1)
        ]
    return list(zip(*taken[1:], strict=True))


def epoch_ours(folder: Path, records: int) -> float:
    """Returns the seconds of an epoch."""
    from clip_jax.data.pipeline import training_batches

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pairs = pairs_of(folder, BATCH, records // BATCH, 224)
    start = time.perf_counter()
    seen = sum(int(host.batch.valid.sum()) for host in training_batches(pairs, num_threads=1, num_workers=0))
    assert seen == records, f"{seen} of {records} pairs"
    return time.perf_counter() - start


def pairs_of(folder: Path, batch: int, steps: int, image_size: int):
    """Returns what is trained on, cropped as OpenCLIP does by default."""
    from clip_jax.data.pipeline import Order, TrainingPairs  # not above: processes that index do without Grain

    source = open_source(f"wds:{folder}")
    return TrainingPairs(
        source=source,
        order=Order.of(source, 0),
        first=0,
        last=steps * batch,
        global_batch=batch,
        rows=range(batch),
        image_size=image_size,
        preprocess=Preprocess(),
        context_length=77,
        tokenize=tokenize,
        augmentation=transforms.Augmentation((0.9, 1.0), (3 / 4, 4 / 3)),
    )


def epoch_theirs(folder: Path, records: int) -> float:
    """Returns the seconds of an epoch: the loader of OpenCLIP's training script, in this process."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import oracles
    import webdataset as wds

    open_clip, data = oracles.open_clip(), oracles.require("open_clip_train.data", package="open_clip_torch")
    oracles.require("torch").set_num_threads(1)
    # A mark that webdataset puts after every shard since 0.2.87; OpenCLIP asks for 0.2.86 and stumbles over it.
    data.tar_file_expander = functools.partial(wds.tariterators.tar_file_expander, eof_value=None)
    arguments = types.SimpleNamespace(
        train_data=f"{folder}/{{00000..00003}}.tar",
        train_num_samples=records,
        train_data_upsampling_factors=None,
        batch_size=BATCH,
        workers=0,
        world_size=1,
        seed=0,
    )
    transform = open_clip.transform.image_transform(224, is_train=True)
    loader = data.get_wds_dataset(arguments, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-32")).dataloader
    start = time.perf_counter()
    seen = sum(len(images) for images, texts in loader)
    assert seen == records, f"{seen} of {records} pairs"
    return time.perf_counter() - start


# The index of 100,000 records.


def index(folder: Path) -> Iterator[Row]:
    records = 100_000
    training_shards.write(folder, 100, records // 100, 64, 1000)
    built = []
    for _ in range(3):
        for file in folder.glob("*.index"):
            file.unlink()
        built.append(alone(opening, folder))
    rates = [records / seconds for seconds in built]
    rate = statistics.median(rates)
    spread = f" ({min(rates):,.0f}-{max(rates):,.0f})"
    yield Row("100,000 records indexed, records/s", f"{rate:,.0f}{spread}", ">= 10,000", rate >= 10_000)
    again = statistics.median(alone(opening, folder) for _ in range(5))
    yield Row("... opened again, s", f"{again:.2f}", "<= 0.5", again <= 0.5)


def opening(folder: Path) -> float:
    """Returns the seconds that shards take to open."""
    start = time.perf_counter()
    open_source(f"wds:{folder}")
    return time.perf_counter() - start


# Ten million records: what there is of their shards is the index.


def large(folder: Path) -> Iterator[Row]:
    shards, each = 1000, 10_000
    members = [tar.Member("", tar.BLOCK * (2 * i + 1), 300, i) for i in range(2 * each)]
    files = [shard_index._Found(member) for member in members]
    table = shard_index._table([(b"%09d" % i, files[2 * i : 2 * i + 2]) for i in range(each)], LAION)
    noted = dataclasses.asdict(shard_index.Summary(each, 300 * each, {}))
    for shard in rich.progress.track(range(shards), "writing 10,000,000 rows"):
        path = folder / f"{shard:05d}.tar"
        path.touch()
        os.truncate(path, 4 * tar.BLOCK * each)
        [file] = storage.look_up([str(path)])
        index_file.write(file, LAION.tag(), table.schema, lambda: [table], noted)
    found = [alone(visiting, folder, shards * each) for _ in range(3)]
    seconds, opened, visited, median, longest = (statistics.median(column) for column in zip(*found, strict=True))
    yield Row("10,000,000 records, opened, s", f"{seconds:.2f}", "<= 5", seconds <= 5)
    yield Row("... memory then, MB", f"{opened:.0f}")
    yield Row("... after 200,000 look-ups, MB", f"{visited:.0f}", "<= 500", visited <= 500)
    yield Row("... a look-up at any place, ms", f"{median:.3f}, at most {longest:.2f}", "<= 10", longest <= 10)


def visiting(folder: Path, records: int) -> tuple[float, ...]:
    """Returns seconds to open, megabytes then and in the end, and milliseconds of a look-up: median and longest."""
    from clip_jax.data.pipeline import Order

    start = time.perf_counter()
    source = open_source(f"wds:{folder}")
    seconds = time.perf_counter() - start
    assert len(source) == records
    opened, order, times = memory([os.getpid()]), Order.of(source, 0), []
    gc.disable()  # the interpreter's collection of everything, once in so many look-ups, takes 80 ms
    for position in np.random.default_rng(0).integers(0, 30 * records, 200_000).tolist():
        start = time.thread_time()  # of this thread: without those whose turn on the core comes in between
        _, index = order[position]
        source._row(*source._place(index))
        times.append(1000 * (time.thread_time() - start))
    return seconds, opened, memory([os.getpid()]), statistics.median(times), max(times)


# A long run.


def memory_of_a_run(folder: Path) -> Iterator[Row]:
    training_shards.write(folder, 4, 1000, 64, 500)
    for workers in (0, 2):
        sampled = alone(running, folder, workers)
        start, end = sampled[0], max(sampled[-5:])
        name, growth = f"{STEPS:,} steps, {workers} workers: memory, MB", end / start - 1
        yield Row(name, f"{start:.0f} to {end:.0f}, {growth:+.1%}", "<= 5 %", growth <= 0.05)


def running(folder: Path, workers: int) -> list[float]:
    """Returns the megabytes of this process and of its workers, after some steps and every thousand from then on."""
    from clip_jax.data.pipeline import training_batches

    pairs = pairs_of(folder, 8, STEPS, 32)
    sampled = []
    batches = training_batches(pairs, num_threads=1, num_workers=workers)
    for step, _ in enumerate(rich.progress.track(batches, f"{workers} workers", STEPS), 1):
        if step >= WARM_STEPS and step % EVERY == 0:
            sampled.append(memory(tree(os.getpid())))
    return sampled


def tree(pid: int) -> list[int]:
    """Returns a process and all that it has started."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(found for file in threads for child in file.read_text().split() for found in tree(int(child)))]


def memory(pids: list[int]) -> float:
    """Returns the megabytes that processes have in memory, mapped files among them."""
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


ROWS = {"decoding": decoding, "index": index, "large": large, "memory": memory_of_a_run}

if __name__ == "__main__":
    main()
