"""What a run takes beside its computing: `train.py` from its command to its first step, for the first time and, with
what was compiled then, again; and what each step takes outside of the compiled one."""

import contextlib
import dataclasses
import io
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from peers import OURS
from side_by_side import Row

ROOT = Path(__file__).parents[2]
FIRST = "the first start"
L14 = (
    *("--config=configs/openai_vit_l14.py", "--config.data.train=tfds:captioned_shapes:train"),
    *("--config.data.global_batch=4", "--config.mesh.data=1", "--config.mesh.fsdp=1"),
)
# By what is started: the most seconds of a first start, and rounds.
STARTS = {
    "quickstart": (("--config=configs/quickstart.py",), 15.0, 3),
    "ViT-L/14, batch 4": (L14, 60.0, 2),
}
AGAIN = 2.0  # so many times as fast a second start is to be
LIMIT = 600  # seconds that a start may take before it is given up
WARM, STEPS = 50, 400
OUTSIDE = 2.0  # milliseconds


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields what starts take, and what steps."""
    for name, (arguments, most, rounds) in list(STARTS.items())[: 1 if quick else None]:
        first, again = [], []
        for n in range(1 + (1 if quick else rounds)):
            workdir = folder / f"{name.partition(',')[0].replace('/', '-')}-{n}"
            first.append(until_first_step(workdir, arguments))
            again.append(until_first_step(workdir, arguments))
        # The first round makes the data set, and reads all files into the system's memory.
        yield Row(f"{name}: first step of a first start", {OURS: first[1:]}, most=most)
        yield Row(f"{name}: of a second", {OURS: again[1:], FIRST: first[1:]}, bar=AGAIN, baselines=(FIRST,))
    outside = [outside_the_step(folder / f"outside-{n}") for n in range(1 if quick else 2)]
    note = f"of {STEPS} steps: batches, log lines, the bar"
    yield Row("quickstart: a step outside of the compiled one", {OURS: outside}, "ms", most=OUTSIDE, note=note)


def until_first_step(workdir: Path, arguments: tuple[str, ...]) -> float:
    """Returns the seconds from the command to the line of the first step, which is done then."""
    command = [sys.executable, "train.py", f"--workdir={workdir}", *arguments, "--config.duration=100_000 steps"]
    environment = os.environ | {"CLIP_JAX_CACHE": f"{workdir}-cache"}  # a first start has none
    lines = workdir / "metrics.jsonl"
    lines.unlink(missing_ok=True)  # of the first start; it has no checkpoint to go on from
    start = time.perf_counter()
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as process:
        while not lines.exists() or not lines.read_text().endswith("\n"):
            if process.poll() is not None or time.perf_counter() - start > LIMIT:
                process.kill()
                raise RuntimeError(f"{' '.join(command)}: no first step\n{process.stderr.read()}")
            time.sleep(0.01)
        taken = time.perf_counter() - start
        process.send_signal(signal.SIGKILL)
    return taken


def outside_the_step(workdir: Path) -> float:
    """Returns the milliseconds that a step of the quickstart's run takes outside of the compiled one, the median: each
    is waited for, and what the loop does between two of them is counted."""
    from clip_jax.command import load_config
    from clip_jax.training import loop

    inside: list[tuple[float, float]] = []
    assemble = loop.assemble

    def assembled(*arguments, **known):
        import jax

        program = assemble(*arguments, **known)

        def step(state, batch):
            start = time.perf_counter()
            found = jax.block_until_ready(program.train_step(state, batch))
            inside.append((start, time.perf_counter()))
            return found

        return dataclasses.replace(program, train_step=step)

    config = load_config(ROOT / "configs/quickstart.py")
    config = dataclasses.replace(config, duration=f"{WARM + STEPS} steps", checkpoint_every=10 * STEPS)
    with mock.patch.object(loop, "assemble", assembled), contextlib.redirect_stdout(io.StringIO()):
        loop.train(config, workdir)
    gaps = [begun - ended for (_, ended), (begun, _) in zip(inside[WARM:], inside[WARM + 1 :], strict=False)]
    return 1e3 * statistics.median(gaps)
