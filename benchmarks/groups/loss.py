"""The contrastive loss with its gradients, from normalised embeddings: ours in the form that a run chooses by itself,
our dense form, and OpenCLIP's `ClipLoss`; time, and the memory it adds to a process."""

import functools
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import peers
from peers import OURS
from side_by_side import Row, in_turns

# By whether it is to be quick: pairs, and rounds.
SIZES = {True: ((4096, 2),), False: ((4096, 5), (16384, 3), (32768, 1))}
EMBED_DIM, SCALE = 512, 14.3
DENSE, PEER = "dense (ours)", "OpenCLIP"
MATRICES = {OURS: 0, DENSE: 3, PEER: 7}  # of pairs × pairs that are there at once, at most; seen at 16,384
SHARE = 0.8  # of the memory that is free, for these
CLOSE = 1e-5


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields time and memory for each number of pairs."""
    for pairs, rounds in SIZES[quick]:
        jobs, gaps = peers.available(functools.partial(_job, pairs=pairs), (OURS, DENSE, PEER))
        losses = {who: job() for who, job in jobs.items()}
        assert all(abs(loss / losses[OURS] - 1) < CLOSE for loss in losses.values()), losses
        known = {"baselines": (DENSE,), "gaps": gaps}
        yield Row(f"{pairs:,} pairs", in_turns(jobs, rounds), **known)
        memory = {who: [_memory(who, pairs) for _ in range(min(rounds, 3))] for who in jobs}
        yield Row(f"{pairs:,} pairs: memory beside the embeddings", memory, "MB", **known)


def _embeddings(pairs: int) -> list[np.ndarray]:
    found = np.random.default_rng(0).normal(size=(2, pairs, EMBED_DIM)).astype(np.float32)
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in found]


def _job(who: str, pairs: int) -> Callable[[], float]:
    """Returns the call that computes the loss and its gradients, and returns the loss.

    Raises:
        peers.Gap: the peer is not installed, or memory does not suffice.
    """
    needed, there = 4 * pairs**2 * MATRICES[who], SHARE * _free()
    if needed > there:
        raise peers.Gap(f"takes {needed / 1e9:.0f} GB, here are {there / 1e9:.0f}")
    img_BE, txt_BE = _embeddings(pairs)
    if who == PEER:
        package = peers.module(PEER)
        import torch

        img, txt = (torch.from_numpy(x).requires_grad_() for x in (img_BE, txt_BE))
        scale, loss_of = torch.tensor(SCALE, requires_grad=True), package.loss.ClipLoss()

        def theirs() -> float:
            img.grad = txt.grad = scale.grad = None
            loss = loss_of(img, txt, scale)
            loss.backward()
            return float(loss)

        return theirs
    import jax
    import jax.numpy as jnp

    from clip_jax import losses, sharding
    from clip_jax.config import LossConfig, MeshConfig

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    ring = losses.ring_for(LossConfig(form="dense" if who == DENSE else "auto"), mesh, sharding.BATCH_AXES, pairs)

    def loss(img_BE, txt_BE, scale, valid_B):
        return losses.softmax(img_BE, txt_BE, scale=scale, valid_B=valid_B, ring=ring).loss

    arguments = [jnp.asarray(img_BE), jnp.asarray(txt_BE), jnp.float32(SCALE), jnp.ones(pairs, bool)]
    compute = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile()
    return lambda: float(jax.block_until_ready(compute(*arguments))[0])


def _free() -> int:
    """Returns the bytes of this machine's memory that a process can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _memory(who: str, pairs: int) -> float:
    """Returns the MB that a process has had at most beyond what it had with a small loss computed."""
    command = [sys.executable, "-m", "groups.loss", who, str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def _main(who: str, pairs: int) -> None:
    _job(who, 1024)()  # imports and threads
    job = _job(who, pairs)  # and what compiling takes
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    job()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps((1024 * int(peak.split()[1]) - resident) / 1e6))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
