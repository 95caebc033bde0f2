"""A checkpoint of ViT-B/32 with AdamW's moments, written until it is whole and read again, beside `torch.save` and
`torch.load` of as many numbers; ours has checksums, which are verified."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import peers
from peers import OURS
from side_by_side import Row

PEER = "PyTorch"
VARIANT = {True: "ViT-W64/4@16px", False: "ViT-B/32"}  # by whether it is to be quick
ROUNDS = {True: 2, False: 3}


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields writing, and reading."""
    made, gaps = peers.available(lambda who: MAKERS[who](VARIANT[quick]), MAKERS)
    taken: dict[str, tuple[list[float], list[float]]] = {who: ([], []) for who in made}
    for n in range(ROUNDS[quick] + 1):
        for who, once in made.items():
            seconds = once(folder / who)
            shutil.rmtree(folder / who)
            if n:
                for of_kind, found in zip(taken[who], seconds, strict=True):
                    of_kind.append(found)
    for i, job in enumerate(("written", "read")):
        yield Row(f"{VARIANT[quick]} with moments {job}", {who: found[i] for who, found in taken.items()}, gaps=gaps)


def _ours(variant: str) -> Callable[[Path], tuple[float, float]]:
    from clip_jax.config import Config, ModelConfig
    from clip_jax.training.checkpoint import Checkpoints, Keep
    from clip_jax.training.program import assemble

    program = assemble(Config(model=ModelConfig(variant=variant)), jax.devices()[:1], records=100_000)
    state = program.initial_state()

    def once(folder: Path) -> tuple[float, float]:
        with Checkpoints(folder, keep=Keep(latest=1)) as checkpoints:
            start = time.perf_counter()
            checkpoints.save(state, {"examples_seen": 0})
            checkpoints._manager.wait_until_finished()
            written = time.perf_counter()
            latest, _ = checkpoints.last_whole()
            jax.block_until_ready(checkpoints.restore(latest, program.state))
            return written - start, time.perf_counter() - written

    return once


def _theirs(variant: str) -> Callable[[Path], tuple[float, float]]:
    try:
        import torch
    except ImportError as error:
        raise peers.Gap(str(error)) from error
    from clip_jax.models.clip import Definition
    from clip_jax.models.variants import VARIANTS

    shapes = jax.tree.leaves(Definition(VARIANTS[variant]).shapes().params)
    content = {
        f"{kind}.{i}": torch.from_numpy(np.full(x.shape, 0.5, np.float32))
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for i, x in enumerate(shapes)
    }

    def once(folder: Path) -> tuple[float, float]:
        folder.mkdir()
        start = time.perf_counter()
        torch.save(content, folder / "checkpoint.pt")
        written = time.perf_counter()
        torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        return written - start, time.perf_counter() - written

    return once


MAKERS = {OURS: _ours, PEER: _theirs}
