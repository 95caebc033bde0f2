"""On one NVIDIA GPU in bfloat16: training, encoding and the loss; pairs a second, MFU, memory, what compiling takes.

    python benchmarks/gpu.py [--only=peak,sweep,training,encoding,loss] [--variant=ViT-B-32] [--output=FOLDER]
                             [--minutes=9.5] [--resume]

Beside OpenCLIP with torch.compile and fused attention, and as it is, in the same run: each side has the GPU for itself,
in a process of its own (`on_gpu/job.py` says what it times), and they take turns. This process only asks and compares.
What cannot be measured is a gap with its reason: memory, a compiler, a package. A peer whose loss or features are not
ours is none.

- peak: the largest rate of a product of two matrices.
- sweep: for each variant, attention and what the backward pass computes again, at the smallest batch; with the better
  attention at larger ones; parts of the largest batch and of twice that; XLA's flags, each by itself, then together
  those that gain. At the end the lines for a config.
- training: a step at every batch, ours as sweep.json in FOLDER has found best; then turns, each at its best batch.
- encoding: images to features; attention as `clip_jax.load` chooses it, and by cuDNN's kernels.
- loss: value and gradients of float32 embeddings, a row for time and one for memory: all results, the gradients with
  them, and what is there in between; not the embeddings. The larger of what the compiler has planned and what the
  device had in use at most, compiling included, so that it is never less than it takes.

MFU: analytic FLOPs (`clip_jax/flops.py`) over the data sheet's peak, where that is known, and over what "peak" finds.
Hardware: one NVIDIA GPU that nobody else uses, with jax[cuda] and torch; peers are measured where they are installed.
Time: on an H200 perhaps fifteen minutes a variant for training, twenty for a sweep, five each for the rest. --minutes
ends it by then, and it says what is missing; --resume goes on where a run with the same FOLDER has ended.
`--toy` does it all with a tiny model on whatever there is: it shows that the script runs; no figure of it counts.
In FOLDER (runs/gpu) each part leaves PART.json, written whenever something is known; and see `on_gpu/apart.py`.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich.console
from on_gpu import encoding, loss, peak, sweep, training
from on_gpu.apart import Processes
from on_gpu.job import Job
from on_gpu.lab import Lab, Model, Size

from clip_jax.config import REMAT_POLICIES

PARTS = ("peak", "sweep", "training", "encoding", "loss")  # in this order: each uses what those before have found
FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_triton_gemm_any=true",
    "--xla_gpu_enable_cublaslt=true",
    "--xla_gpu_cudnn_gemm_fusion_level=2",
    "--xla_gpu_enable_command_buffer=",  # none
)


MODELS = {  # by OpenCLIP's names
    "ViT-L-14": Model(batches=(256, 512, 1024), bar=0.50),
    "ViT-B-16": Model(batches=(512, 1024, 2048), bar=0.45),
    "ViT-B-32": Model(batches=(1024, 2048, 4096), bar=0.35),
}
TOY = {"ViT-W64/4@16px": Model(batches=(8,), bar=None)}
ENCODED = "ViT-L-14"  # unless another variant is asked for


FULL = Size(
    lap=1.5,
    laps=4,
    turns=3,
    products=(8192, 16384),
    images=256,
    pairs=tuple(2**n for n in range(12, 19)),
    attention=("cudnn", "xla"),
    remat=REMAT_POLICIES,
    flags=FLAGS,
)
SMALL = Size(
    lap=0.01,
    laps=2,
    turns=1,
    products=(256,),
    images=4,
    pairs=(64,),
    attention=("xla",),
    remat=("none", "attention"),
    flags=FLAGS[:1],
)


def main() -> None:
    """Measures what is asked for, prints it, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--variant", help="one of the models")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--toy", action="store_true")
    asked = parser.parse_args()
    if unknown := set(asked.only.split(",")) - set(PARTS):
        parser.error(f"--only={min(unknown)} is none of {', '.join(PARTS)}")
    models = TOY if asked.toy else MODELS
    if asked.variant is not None and asked.variant not in models:
        parser.error(f"--variant={asked.variant} is none of {', '.join(models)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the process that has the GPU ends, too
    console = rich.console.Console(width=150, highlight=False, markup=False)
    with tempfile.TemporaryDirectory(prefix="clip_jax-") as scratch:
        until = time.monotonic() + 60 * asked.minutes
        processes = Processes(asked.output, Path(scratch), until, say=console.print)
        device = processes.start(Job("device"))
        if "gap" in device:
            parser.error(f"JAX has no device: {device['gap']}")
        if device["platform"] != "gpu" and not asked.toy:
            parser.error(f"no NVIDIA GPU here, but {device['kind']}; --toy shows that the script runs")
        lab = Lab.of(processes, console, device, size=SMALL if asked.toy else FULL, toy=asked.toy)
        if asked.resume:
            processes.resume()
        console.print(f"{device['kind']}, {lab.report.head['machine']['packages']}")
        missing = measure(lab, asked.only.split(","), [asked.variant] if asked.variant else list(models), models)
        if processes.is_late:
            console.print("time was up: what is missing is a gap; --resume goes on", style="red")
    if missing:
        sys.exit(f"nothing of ours was measured: {', '.join(missing)}")


def measure(lab: Lab, parts: Sequence[str], variants: Sequence[str], models: Mapping[str, Model]) -> list[str]:
    """Returns the parts, and of which variants, in which nothing of ours could be measured."""
    if not {"sweep", "training"}.isdisjoint(parts) and not lab.report.found("peak"):
        parts = ["peak", *parts]  # which MFU is told by, too
    encoded = [ENCODED] if ENCODED in variants else variants
    calls = {"peak": lambda: peak.measure(lab), "loss": lambda: loss.measure(lab)}
    calls |= {f"sweep of {name}": lambda name=name: sweep.measure(lab, name, models[name]) for name in variants}
    calls |= {f"training of {name}": lambda name=name: training.measure(lab, name, models[name]) for name in variants}
    calls |= {f"encoding of {name}": lambda name=name: encoding.measure(lab, name) for name in encoded}
    asked = [name for part in PARTS if part in parts for name in calls if name.partition(" ")[0] == part]
    return [name for name in asked if not calls[name]()]


if __name__ == "__main__":
    main()
