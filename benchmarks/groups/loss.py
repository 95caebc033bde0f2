"""The contrastive loss with its gradients, from normalised embeddings: ours as a run would choose its form, our dense
form, and OpenCLIP's `ClipLoss`; time, and the memory it adds to a process."""

import functools
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import peers
from side_by_side import OURS, Row, in_turns

PAIRS = {True: (4096,), False: (4096, 16384)}  # by whether it is to be quick
EMBED_DIM, SCALE = 512, 14.3
DENSE, PEER = "dense (ours)", "OpenCLIP"
CLOSE = 1e-5


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields time and memory for each number of pairs."""
    for pairs in PAIRS[quick]:
        jobs, gaps = peers.available(functools.partial(_job, pairs=pairs), (OURS, DENSE, PEER))
        losses = {who: job() for who, job in jobs.items()}
        assert all(abs(loss / losses[OURS] - 1) < CLOSE for loss in losses.values()), losses
        yield Row(f"{pairs:,} pairs", in_turns(jobs, 3), gaps=gaps)
        memory = {who: [_memory(who, pairs) for _ in range(1 if quick else 3)] for who in jobs}
        yield Row(f"{pairs:,} pairs: memory beside the embeddings", memory, "MB", gaps=gaps)


def _embeddings(pairs: int) -> list[np.ndarray]:
    found = np.random.default_rng(0).normal(size=(2, pairs, EMBED_DIM)).astype(np.float32)
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in found]


def _job(who: str, pairs: int) -> Callable[[], float]:
    """Returns the call that computes the loss and its gradients, and returns the loss.

    Raises:
        peers.Gap: the peer is not installed.
    """
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

    def loss(img_BE, txt_BE, scale):
        return losses.softmax(img_BE, txt_BE, scale=scale, valid_B=jnp.ones(pairs, bool), ring=ring).loss

    compute = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    arguments = [jnp.asarray(img_BE), jnp.asarray(txt_BE), jnp.float32(SCALE)]
    return lambda: float(jax.block_until_ready(compute(*arguments))[0])


def _memory(who: str, pairs: int) -> float:
    """Returns the MB that a process has had at most beyond what it had with a small loss computed."""
    command = [sys.executable, "-m", "groups.loss", who, str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def _main(who: str, pairs: int) -> None:
    _job(who, 1024)()  # imports, threads, what compiling takes
    job = _job(who, pairs)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    job()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps(int(peak.split()[1]) / 1000 - resident / 1e6))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
