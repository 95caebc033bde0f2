"""One thing that `gpu.py` wants to know, in a process that has the GPU for itself, and gives it back by ending.

    python -m on_gpu.job JOB SCRATCH    a `Job` as JSON; where its weights lie: a job "weights" has written them

Prints a line of JSON: what was found; or, with the traceback on stderr, {"gap": …}: memory does not suffice, a kernel
or a compiler refuses, a package is not there.

`seconds` are those of a call, lap by lap: so many calls as fill a lap are started one behind the other, then the device
is waited for. A training step takes the state that the one before it has left. Two calls and one to tell how long a lap
is go before; what compiling takes is apart: ours is compiled without being run, of PyTorch's it is the first call less
one of the others. `peak_gb` is the most that the process has had on the device at once, as JAX's or PyTorch's allocator
counts it; None: the device does not tell.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import peers
from groups import models, training
from peers import OURS

from clip_jax.models.variants import VARIANTS
from clip_jax.weights.bundle import Bundle

if TYPE_CHECKING:
    import jax

PEER, COMPILED = training.PEER, training.COMPILED
TRANSFORMERS = "transformers, torch.compile"
DENSE = "clip_jax, dense"
FLOAT32 = f"{PEER}, float32"  # by tensor cores' TF32; as its training does it, in bfloat16, it is called PEER
EMBED_DIM, SCALE = 512, 14.3
SHOWN = 2  # images whose features are compared

Found = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured, of whom, and how."""

    kind: str  # a word of KINDS
    who: str = OURS
    platform: str = "gpu"  # as JAX names it
    variant: str = ""  # OpenCLIP's name of the model
    n: int = 0  # pairs or images at once; rows of a product
    turn: int = 0  # in the first nothing is compiled yet
    attention: str = "auto"
    remat: str = "none"
    microbatch: int | None = None
    flags: str = ""  # of XLA
    lap: float = 0.0  # seconds
    laps: int = 0


def main(job: Job, scratch: Path) -> None:
    try:
        found = KINDS[job.kind](job, scratch)
    except Exception as error:  # whatever ends it is why it was not measured; `gpu.py` keeps the traceback
        traceback.print_exc()
        found = {"gap": said(error), "no_memory": is_memory(error)}
    print(json.dumps(found), flush=True)


def said(error: Exception) -> str:
    """Returns an error in one line that is not too long."""
    text = " ".join(str(error).split())
    return (text if isinstance(error, peers.Gap) else f"{type(error).__name__}: {text}")[:240]


def is_memory(error: Exception) -> bool:
    """Returns whether the device had no more: JAX says so in words, PyTorch by the error's class."""
    return "RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "OutOfMemoryError"


def seconds_of(job: Job, call: Callable[[], Any], wait: Callable[[Any], Any]) -> list[float]:
    """Returns the seconds of a call, lap by lap; `wait` returns when a result is there, and all before it."""
    for _ in range(2):
        wait(call())
    start = time.perf_counter()
    wait(call())
    calls = max(1, math.ceil(job.lap / (time.perf_counter() - start)))
    taken = []
    for _ in range(job.laps):
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        wait(last)
        taken.append((time.perf_counter() - start) / calls)
    return taken


# --- in JAX ---------------------------------------------------------------------------------------------------------


def compiled(lowered: Callable[[], "jax.stages.Lowered"]) -> tuple["jax.stages.Compiled", Found]:
    """Returns the program, and what compiling took and has planned."""
    start = time.perf_counter()
    program = lowered().compile()
    taken, plan = time.perf_counter() - start, program.memory_analysis()
    planned = (plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes) / 1e9
    return program, {"compile_seconds": taken, "planned_gb": planned}


def memory(what: str) -> int | None:
    import jax

    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats[what]


def peak_gb(before: int = 0) -> float | None:
    """Returns the GB that there were at most beyond those before."""
    peak = memory("peak_bytes_in_use")
    return None if peak is None else (peak - before) / 1e9


def device(job: Job, scratch: Path) -> Found:
    """Returns what JAX has here."""
    import jax

    first = jax.devices()[0]
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "bytes": (first.memory_stats() or {}).get("bytes_limit"),
    }


def product(job: Job, scratch: Path) -> Found:
    """Returns the seconds of a product of two n × n matrices in bfloat16."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (job.n, job.n), jnp.bfloat16)
    program, found = compiled(lambda: jax.jit(lambda x: x @ x).lower(x))
    return found | {"seconds": seconds_of(job, lambda: program(x), jax.block_until_ready)}


def our_program(job: Job) -> Any:
    import jax

    from clip_jax.training.program import assemble

    how = {"microbatch": job.microbatch, "remat": job.remat, "attention": job.attention}
    config = training.config(job.variant, job.n, compute_dtype="bfloat16", **how)
    return assemble(config, jax.devices()[:1], records=100_000)


def our_step(job: Job, scratch: Path) -> Found:
    import jax

    from clip_jax import sharding
    from clip_jax.typing import Batch

    program = our_program(job)
    train_step, found = compiled(lambda: program.train_step.lower(program.state, program.batch))
    images, tokens = training.inputs(job.variant, job.n)
    batch = sharding.to_mesh(Batch(images, tokens, np.ones(job.n, bool)), job.n, program.mesh)
    state = program.initial_state()

    def step() -> tuple:
        nonlocal state
        state, metrics = train_step(state, batch)
        return state, metrics["loss"]

    found["loss"] = float(step()[1])
    found["seconds"] = seconds_of(job, step, jax.block_until_ready)
    return found | {"peak_gb": peak_gb(), "attention": program.attention}


def weights(job: Job, scratch: Path) -> Found:
    """Writes the weights that `our_step` starts from as the peers read them; returns how many numbers they are."""
    import jax

    from clip_jax.weights.mapping import flatten

    program = our_program(job)
    arrays = {path: np.array(x) for path, x in flatten(jax.device_get(program.initial_state().weights)).items()}
    names = ("OpenCLIP", "transformers")
    models.write_all(Bundle(program.architecture, arrays, job.variant, "random"), scratch / job.variant, names)
    return {"numbers": sum(x.size for x in arrays.values())}


def our_features(job: Job, scratch: Path) -> Found:
    """Of `clip_jax.load`'s model; how its attention is computed, "xla" is what that chooses."""
    import jax
    import jax.numpy as jnp

    from clip_jax import api
    from clip_jax.compiled import encode_image

    model, _ = api.load(written(scratch, job, PEER), dtype="bfloat16")
    definition, given = model.definition.computed(attention=job.attention), jnp.asarray(images_of(job))
    program, found = compiled(lambda: encode_image.lower(definition, model.placed, given))
    found["features"] = np.float32(program(model.placed, given)[:SHOWN]).tolist()
    found["seconds"] = seconds_of(job, lambda: program(model.placed, given), jax.block_until_ready)
    return found | {"peak_gb": peak_gb()}


def our_loss(job: Job, scratch: Path) -> Found:
    """Of float32 embeddings as training has them; `planned_gb` are all results, gradients with them, and what is there
    in between; `peak_gb` is what the device had beyond the embeddings, what compiling has tried out included."""
    import jax

    from clip_jax import losses, sharding
    from clip_jax.config import LossConfig, MeshConfig

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    ring = losses.ring_for(LossConfig(form="dense" if job.who == DENSE else "auto"), mesh, sharding.BATCH_AXES, job.n)

    def loss(img_BE, txt_BE, scale, valid_B):
        return losses.softmax(img_BE, txt_BE, scale=scale, valid_B=valid_B, ring=ring).loss

    arguments = jax.device_put((*embeddings(job.n), np.float32(SCALE), np.ones(job.n, bool)), jax.devices()[0])
    program, found = compiled(lambda: jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments))
    before = memory("bytes_in_use") or 0
    found["loss"] = float(jax.block_until_ready(program(*arguments))[0])
    found["peak_gb"] = peak_gb(before)
    return found | {"seconds": seconds_of(job, lambda: program(*arguments), jax.block_until_ready)}


# --- in PyTorch -----------------------------------------------------------------------------------------------------


class Torch(NamedTuple):
    """PyTorch as OpenCLIP's training script sets it."""

    torch: Any
    device: str

    @classmethod
    def of(cls, job: Job) -> "Torch":
        """Raises peers.Gap: it is not installed, or sees no GPU where there is one."""
        try:
            import torch
        except ImportError as error:
            raise peers.Gap(f"does not import: {error}") from error
        if job.platform == "gpu" and not torch.cuda.is_available():
            raise peers.Gap("PyTorch sees no GPU")
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        return cls(torch, "cuda" if job.platform == "gpu" else "cpu")

    def wait(self, _: Any = None) -> None:
        """Returns when all is done that was started; on a CPU a call returns no sooner."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def peak_gb(self, before: int = 0) -> float | None:
        return (self.torch.cuda.max_memory_allocated() - before) / 1e9 if self.device == "cuda" else None

    def first(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Returns the seconds and the result of a first call."""
        start = time.perf_counter()
        result = call()
        self.wait()
        return time.perf_counter() - start, result

    def measured(self, job: Job, call: Callable[[], Any], first: float) -> Found:
        """Returns what came after the first call, and what that took for compiling."""
        seconds = seconds_of(job, call, self.wait)
        compile_seconds = max(first - statistics.median(seconds), 0.0)
        return {"seconds": seconds, "compile_seconds": compile_seconds, "peak_gb": self.peak_gb()}


def their_step(job: Job, scratch: Path) -> Found:
    """In OpenCLIP's `amp_bf16`; on a CPU in float32."""
    there = Torch.of(job)
    bundle = Bundle(VARIANTS[job.variant], {}, job.variant, "random")  # its arrays are in the file
    inputs = training.inputs(job.variant, job.n)
    peer = training.Peer.of(bundle, written(scratch, job, PEER), *inputs, there.device)
    call = there.torch.compile(peer.model) if job.who == COMPILED else peer.model
    first, loss = there.first(lambda: peer.step(call))
    return {"loss": float(loss)} | there.measured(job, lambda: peer.step(call), first)


def their_features(job: Job, scratch: Path) -> Found:
    """All in bfloat16, its weights too."""
    there, name = Torch.of(job), job.who.partition(",")[0]
    model = peers.load(name, peers.imported(name), written(scratch, job, name))
    model = model.to(device=there.device, dtype=there.torch.bfloat16)
    pixels = there.torch.from_numpy(images_of(job).transpose(0, 3, 1, 2).copy()).to(there.device, there.torch.bfloat16)
    encode = model.encode_image if name == PEER else lambda x: model.get_image_features(pixel_values=x)
    encode = encode if job.who == PEER else there.torch.compile(encode)

    def call() -> Any:
        with there.torch.no_grad():
            return models.features(encode(pixels))

    first, features = there.first(call)
    return {"features": features[:SHOWN].float().cpu().tolist()} | there.measured(job, call, first)


def their_loss(job: Job, scratch: Path) -> Found:
    """OpenCLIP's `ClipLoss` of float32 embeddings: in autocast, as its `amp_bf16` computes it, or in float32;
    `peak_gb` beyond the embeddings, their gradients included."""
    package, there = peers.module(PEER), Torch.of(job)
    img, txt = (there.torch.from_numpy(x).to(there.device).requires_grad_() for x in embeddings(job.n))
    scale = there.torch.tensor(SCALE, device=there.device, requires_grad=True)
    loss_of, low = package.loss.ClipLoss(), there.torch.bfloat16

    def call() -> Any:
        img.grad = txt.grad = scale.grad = None
        with there.torch.autocast(there.device, dtype=low, enabled=job.who != FLOAT32):
            loss = loss_of(img, txt, scale)
        loss.backward()
        return loss.detach()

    before = there.torch.cuda.memory_allocated() if there.device == "cuda" else 0
    first, loss = there.first(call)
    return {"loss": float(loss)} | there.measured(job, call, first) | {"peak_gb": there.peak_gb(before)}


# --- the same for all -----------------------------------------------------------------------------------------------


def written(scratch: Path, job: Job, name: str) -> Path:
    """Returns where the weights lie as a project reads them.

    Raises:
        peers.Gap: nobody could write them.
    """
    folder = scratch / job.variant / name
    if not folder.exists():
        raise peers.Gap("there are no weights")
    return folder


def images_of(job: Job) -> np.ndarray:
    """Returns normalised pixels [n H W C]."""
    side = VARIANTS[job.variant].image.image_size
    return np.random.default_rng(0).normal(size=(job.n, side, side, 3)).astype(np.float32)


def embeddings(pairs: int) -> list[np.ndarray]:
    """Returns images and texts [B E] of length one, of which a pair's have a cosine of about 1/√2."""
    img_BE, noise_BE = np.random.default_rng(0).standard_normal((2, pairs, EMBED_DIM), np.float32)
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (img_BE, img_BE + noise_BE)]


def of_side(ours: Callable, theirs: Callable) -> Callable[[Job, Path], Found]:
    return lambda job, scratch: (ours if job.who.partition(",")[0] == OURS else theirs)(job, scratch)


KINDS: dict[str, Callable[[Job, Path], Found]] = {
    "device": device,
    "product": product,
    "weights": weights,
    "step": of_side(our_step, their_step),
    "features": of_side(our_features, their_features),
    "loss": of_side(our_loss, their_loss),
}

if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])), Path(sys.argv[2]))
