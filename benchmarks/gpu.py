"""On one NVIDIA GPU in bfloat16: training, encoding and the loss; pairs a second, MFU, memory, what compiling takes.

    python benchmarks/gpu.py [--only=peak,training,encoding,loss,sweep] [--variant=ViT-B-32] [--output=FOLDER]

Beside OpenCLIP with torch.compile and fused attention, in the same run; "sweep" looks for the best settings.
Hardware: one NVIDIA GPU, with jax[cuda] and torch; OpenCLIP and transformers are measured where they are installed.
Time: on an H200 some minutes a part and variant; a sweep compiles a program for each setting.
`--toy` does it all with a tiny model on whatever there is: it shows that the script runs; no figure of it counts.
In FOLDER (runs/gpu) every part leaves PART.json. Each setting of a sweep has a process of its own, so that one for
which memory does not suffice ends none but itself.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has the same GPU

import jax
import jax.numpy as jnp
import numpy as np
import peers
import rich.console
import rich.progress
import rich.table
from groups import models, training
from side_by_side import OURS, Row, table

from clip_jax import flops, losses, sharding
from clip_jax.config import LossConfig, MeshConfig
from clip_jax.training.usage import Usage

PARTS = ("peak", "training", "encoding", "loss", "sweep")
PEAK = flops.PEAKS["NVIDIA H200"]  # dense bfloat16, by NVIDIA's data sheet
# By OpenCLIP's names: batches to look for the best of, and the MFU that we are held to.
VARIANTS = {"ViT-L-14": ((256, 512, 1024), 0.50), "ViT-B-16": ((1024, 2048), 0.45), "ViT-B-32": ((2048, 4096), 0.35)}
TOY = {"ViT-W64/4@16px": ((8, 16), 0.0)}
SETTINGS = {
    "attention": ("xla", "cudnn"),
    "remat": ("none", "dots", "attention"),
    "microbatch": (4,),  # parts of the batch
    "flags": ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_enable_latency_hiding_scheduler=true"),
}
COMPILED = training.COMPILED


class Size(NamedTuple):
    """How much is measured."""

    steps: int  # of a round
    rounds: int
    matmul: int
    pairs: int  # of the loss
    encoded: int  # images at once


FULL, SMALL = Size(20, 5, 16384, 65536, 256), Size(2, 2, 256, 256, 4)


def main() -> None:
    """Measures what is asked for, prints it, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--variant", help="one of the models (the sweep has one: the first)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)  # of a sweep, in a process of its own
    asked = parser.parse_args()
    if asked.setting is not None:
        print(json.dumps(of_setting(asked.setting, SMALL if asked.toy else FULL)))
        return
    if unknown := set(asked.only.split(",")) - set(PARTS):
        parser.error(f"--only={min(unknown)} is none of {', '.join(PARTS)}")
    named = TOY if asked.toy else VARIANTS
    if asked.variant is not None and asked.variant not in named:
        parser.error(f"--variant={asked.variant} is none of {', '.join(named)}")
    device = jax.devices()[0]
    if device.platform != "gpu" and not asked.toy:
        parser.error(f"no NVIDIA GPU here, but {device.device_kind}; --toy shows that the script runs")
    chosen = {name: of for name, of in named.items() if asked.variant in (None, name)}
    asked.output.mkdir(parents=True, exist_ok=True)
    console = rich.console.Console(width=150)
    console.print(f"{device.device_kind}, jax {jax.__version__}")
    for part in asked.only.split(","):
        found = MEASURED[part](chosen, SMALL if asked.toy else FULL, asked.toy, console)
        partial = asked.output / f"partial-{part}.json"
        partial.write_text(json.dumps({"device": device.device_kind, "toy": asked.toy, "found": found}, indent=1))
        partial.replace(asked.output / f"{part}.json")


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def per_call(call: Callable[[], Any], size: Size) -> list[float]:
    """Returns the seconds of a call, round by round: so many are started one behind the other, and waited for."""
    wait(call())
    taken = []
    for _ in range(size.rounds):
        start = time.perf_counter()
        for _ in range(size.steps):
            last = call()
        wait(last)
        taken.append((time.perf_counter() - start) / size.steps)
    return taken


def wait(result: Any) -> None:
    """Returns when a result is there: JAX's, or PyTorch's with all that was started before it."""
    if isinstance(result, jax.Array):
        result.block_until_ready()
    else:
        result.cpu()


def in_turns(jobs: dict[str, Callable[[], Any]], size: Size) -> dict[str, list[float]]:
    """Returns the seconds of a call of each job, which take turns."""
    rounds = [{who: per_call(job, size._replace(rounds=1))[0] for who, job in jobs.items()} for _ in range(size.rounds)]
    return {who: [one[who] for one in rounds] for who in jobs}


# The rate of the largest products, which no model can pass.


def peak(chosen: dict, size: Size, toy: bool, console: rich.console.Console) -> dict[str, float]:
    n = size.matmul
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    rate = 2 * n**3 / float(np.median(per_call(lambda: multiply(x), size)))
    console.print(f"products of {n:,} × {n:,} in bfloat16: {rate / 1e12:,.3g} TFLOP/s, {rate / PEAK:.0%} of {PEAK:.3g}")
    return {"size": n, "rate": rate}


# A step beside OpenCLIP's.


def of_step(setting: dict[str, Any], size: Size) -> tuple[dict[str, Any], training.Ours, tuple]:
    """Returns what a setting of ours gives: seconds a step, pairs/s, MFU, GB, seconds until the first step is done."""
    batch, variant = setting["batch"], setting["variant"]
    parts = setting.get("microbatch")
    config = training.config(
        variant,
        batch,
        microbatch=batch // parts if parts else None,
        compute_dtype="bfloat16",
        remat=setting.get("remat", "none"),
        attention=setting.get("attention", "auto"),
    )
    given = training.inputs(variant, batch)
    ours = training.Ours.of(config, *given)
    start = time.perf_counter()
    wait(ours.step())
    compiled = time.perf_counter() - start
    seconds = float(np.median(per_call(ours.step, size)))
    cost = Usage.of(ours.program).flops * batch
    stats = jax.devices()[0].memory_stats() or {}
    found = {"seconds": seconds, "pairs_per_second": batch / seconds, "mfu": cost / seconds / PEAK, "flops": cost}
    found |= {"peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9, "first_step": compiled}
    return found, ours, given


def steps(chosen: dict, size: Size, toy: bool, console: rich.console.Console) -> list[dict[str, Any]]:
    """Returns a row for each model at its best batch: ours, and OpenCLIP compiled and as it is."""
    found = []
    for variant, (batches, bar) in chosen.items():
        settings = [{"variant": variant, "batch": batch} for batch in batches]
        tried = [of_setting_apart(setting, toy) for setting in settings]
        fits = [one for one in tried if "mfu" in one]
        if not fits:
            console.print(f"{variant}: {tried[0]['error']}")
            continue
        best = max(fits, key=lambda one: one["mfu"])
        batch = best["batch"]
        _, ours, (images, tokens) = of_step({"variant": variant, "batch": batch}, size._replace(rounds=1))
        with tempfile.TemporaryDirectory() as folder:
            make = functools.partial(
                training.theirs,
                bundle=ours.bundle,
                folder=Path(folder) / "model",
                images=images,
                tokens=tokens,
                device="cuda" if on_gpu() else "cpu",
            )
            made, gaps = peers.available(make, (COMPILED, training.PEER))
        taken = in_turns({OURS: ours.step} | made, size)
        row = Row(f"a step of {variant}, batch {batch}, bfloat16", taken, bar=1.3, gaps=gaps)
        console.print(table("training", [row]))
        console.print(f"{variant}: MFU {best['mfu']:.1%} (bar {bar:.0%}), {best['peak_gb']:.1f} GB")
        found.append({"tried": tried, "best": best, "row": row.as_json()})
    return found


# Which settings are best.


def of_setting(setting: dict[str, Any], size: Size) -> dict[str, Any]:
    """Returns what a setting gives, or its error."""
    try:
        return setting | of_step(setting, size)[0]
    except jax.errors.JaxRuntimeError as error:  # memory does not suffice, or a kernel refuses
        return setting | {"error": " ".join(str(error).split())[:200]}


def of_setting_apart(setting: dict[str, Any], toy: bool) -> dict[str, Any]:
    """Returns what a setting gives in a process of its own, with its flags of XLA."""
    command = [sys.executable, __file__, f"--setting={json.dumps(setting)}", *["--toy"] * toy]
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}
    environment |= {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {setting.get('flags', '')}".strip()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = done.stderr.strip().splitlines() or ["it ended without a word"]
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else setting | {"error": lines[-1]}


def settings_of(variant: str, batches: tuple[int, ...], toy: bool) -> Iterator[dict[str, Any]]:
    """Yields every attention and policy of a model at each batch; then parts of a batch, and flags, at the smallest."""
    base = {"variant": variant, "batch": batches[0]}
    if toy:
        yield from (base | {"attention": "xla", "remat": "attention"}, base | {"microbatch": 2})
        return
    for batch, attention, remat in itertools.product(batches, SETTINGS["attention"], SETTINGS["remat"]):
        yield base | {"batch": batch, "attention": attention, "remat": remat}
    for parts in SETTINGS["microbatch"]:
        yield base | {"microbatch": parts}
    for flags in SETTINGS["flags"]:
        yield base | {"flags": flags}


def sweep(chosen: dict, size: Size, toy: bool, console: rich.console.Console) -> list[dict[str, Any]]:
    """Returns what each setting of the first model gives, the best first."""
    variant, (batches, _) = next(iter(chosen.items()))
    asked = list(settings_of(variant, batches, toy))
    found = [of_setting_apart(one, toy) for one in rich.progress.track(asked, f"sweep of {variant}", console=console)]
    found.sort(key=lambda one: -one.get("mfu", 0))
    shown = rich.table.Table(title=f"{variant}, the best first")
    for heading in ("batch", "attention", "remat", "parts", "flags", "pairs/s", "MFU", "GB", "first step, s"):
        shown.add_column(heading, justify="right")
    for one in found:
        cells = [str(one.get(name, "")) for name in ("batch", "attention", "remat", "microbatch", "flags")]
        if "error" in one:
            shown.add_row(*cells, one["error"][:40])
            continue
        measured = (f"{one['pairs_per_second']:,.0f}", f"{one['mfu']:.1%}", f"{one['peak_gb']:.1f}")
        shown.add_row(*cells, *measured, f"{one['first_step']:.0f}")
    console.print(shown)
    return found


# Images to features.


def encoding(chosen: dict, size: Size, toy: bool, console: rich.console.Console) -> list[dict[str, Any]]:
    """Returns a row: ViT-L-14's images, by us, and by OpenCLIP and transformers compiled."""
    variant = next(iter(chosen)) if toy else "ViT-L-14"
    bundle, jobs, gaps = models.drawn(variant), {}, {}
    side = bundle.architecture.image.image_size
    images = np.random.default_rng(0).normal(size=(size.encoded, side, side, 3)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        paths = models.write_all(bundle, Path(folder), ("OpenCLIP", "transformers")[: 1 if toy else 2])
        jobs[OURS] = _our_images(paths[OURS], images)
        made, gaps = peers.available(
            lambda who: _their_images(who, paths[who], images), ("OpenCLIP", "transformers") if not toy else ()
        )
    row = Row(
        f"encode_image of {variant}, {size.encoded} at once, bfloat16", in_turns(jobs | made, size), bar=1.2, gaps=gaps
    )
    console.print(table("encoding", [row]))
    return [row.as_json()]


def _our_images(path: Path, images: np.ndarray) -> Callable[[], jax.Array]:
    from clip_jax import api, compiled

    model, _ = api.load(path, dtype="bfloat16")
    given = jnp.asarray(images)
    return lambda: compiled.encode_image(model.definition, model.placed, given)


def _their_images(who: str, path: Path, images: np.ndarray) -> Callable[[], Any]:
    package = models.imported(who)
    import torch

    device = "cuda" if on_gpu() else "cpu"
    model = models.load(who, package, path).to(device=device, dtype=torch.bfloat16)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device=device, dtype=torch.bfloat16)
    encode = model.encode_image if who != "transformers" else lambda x: model.get_image_features(pixel_values=x)
    encode = torch.compile(encode)

    def run() -> Any:
        with torch.no_grad():
            return models.features(encode(pixels))

    return run


# The loss alone.


def loss(chosen: dict, size: Size, toy: bool, console: rich.console.Console) -> dict[str, float]:
    """Returns the milliseconds and GB of value and gradients, of as many pairs as a pod has in a batch."""
    pairs, embed_dim = size.pairs, 512
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    ring = losses.ring_for(LossConfig(form="ring"), mesh, sharding.BATCH_AXES, pairs)

    def of(img_BE: jax.Array, txt_BE: jax.Array, scale: jax.Array) -> jax.Array:
        return losses.softmax(img_BE, txt_BE, scale=scale, valid_B=jnp.ones(pairs, bool), ring=ring).loss

    given = jax.random.normal(jax.random.key(0), (2, pairs, embed_dim), jnp.bfloat16)
    img_BE, txt_BE = given / jnp.linalg.norm(given, axis=-1, keepdims=True)
    arguments = (img_BE, txt_BE, jnp.float32(14.3))
    program = jax.jit(jax.value_and_grad(of, (0, 1, 2))).lower(*arguments).compile()
    seconds = float(np.median(per_call(lambda: program(*arguments)[0], size)))
    gigabytes = program.memory_analysis().temp_size_in_bytes / 1e9
    console.print(
        f"loss of {pairs:,} pairs, {embed_dim} wide: {1000 * seconds:.1f} ms (bar 50), {gigabytes:.2f} GB (0.6)"
    )
    return {"pairs": pairs, "seconds": seconds, "gb": gigabytes}


MEASURED = {"peak": peak, "training": steps, "encoding": encoding, "loss": loss, "sweep": sweep}

if __name__ == "__main__":
    main()
