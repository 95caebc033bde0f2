"""How long a step waits for a checkpoint, beside how long the save takes in the background.

    python benchmarks/checkpoints.py

Two states: that of `configs/quickstart.py`, and 400 MB of parameters and moments. What is timed is the call that the
loop makes; the state is there before, so that no step is waited for.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from clip_jax.command import load_config
from clip_jax.training.checkpoint import Checkpoints, Keep
from clip_jax.training.program import assemble
from clip_jax.training.state import TrainState

ROUNDS = 25
LARGE = {f"layer{i}": jax.random.normal(jax.random.key(i), (1389, 2000)) for i in range(12)}  # 133 MB, and two moments


def states() -> dict[str, TrainState]:
    quickstart = assemble(load_config(Path("configs/quickstart.py"))).initial_state()
    moments = {"mu": LARGE, "nu": jax.tree.map(jnp.copy, LARGE)}
    return {"quickstart": quickstart, "400 MB": TrainState(jnp.int32(0), LARGE, {}, moments)}


def measured(state: TrainState) -> tuple[list[float], list[float]]:
    """Returns the seconds of each call, and of each save until its checkpoint has its name."""
    waits, saves = [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), keep=Keep(latest=1)) as checkpoints:
        for step in range(ROUNDS + 1):
            state = jax.block_until_ready(
                TrainState(jnp.int32(step), *jax.tree.map(jnp.copy, (state.params, state.statistics, state.optimizer)))
            )
            begun = time.monotonic()
            checkpoints.save(state, {"examples_seen": step})
            waits.append(time.monotonic() - begun)
            checkpoints._manager.wait_until_finished()
            saves.append(time.monotonic() - begun)
    return waits[1:], saves[1:]  # the first makes the folder


def main() -> None:
    table = rich.table.Table(title=f"a save of a checkpoint, medians of {ROUNDS}")
    for heading in ("state", "MB", "a step waits, ms", "slowest, ms", "the save, ms", "share"):
        table.add_column(heading, justify="right")
    for name, state in states().items():
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        waits, saves = measured(state)
        wait, save = statistics.median(waits), statistics.median(saves)
        row = (size / 1e6, 1e3 * wait, 1e3 * max(waits), 1e3 * save)
        table.add_row(name, *(f"{value:,.1f}" for value in row), f"{wait / save:.1%}")
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
