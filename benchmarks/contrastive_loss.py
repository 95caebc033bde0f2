"""The contrastive loss in a ring beside its dense form, on one device of this machine: time and memory, value and
gradients. Times are medians of several, ratios of one run.

    python benchmarks/contrastive_loss.py [--pairs=16384]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table

from clip_jax import losses, sharding
from clip_jax.config import LossConfig, MeshConfig

WIDTHS = (64, 256, 768)
FORMS = ("dense", "ring")
ROUNDS = 3
MEMORY_BATCHES = tuple(2**n for n in range(15, 21))  # 32k to 1M


def program(form: str, pairs: int, width: int, devices: int) -> jax.stages.Compiled:
    """Returns the compiled softmax loss with the gradients of embeddings and scale."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    ring = losses.ring_for(LossConfig(form=form), mesh, sharding.BATCH_AXES, pairs)

    def loss(img_BE, txt_BE, scale, valid_B):
        return losses.softmax(img_BE, txt_BE, scale=scale, valid_B=valid_B, ring=ring).loss

    def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        spec = sharding.BATCH if sizes else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    embeddings = shape(pairs, width)
    arguments = (embeddings, embeddings, shape(), shape(pairs, dtype=bool))
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile()


def seconds(programs: dict[str, jax.stages.Compiled], pairs: int, width: int) -> dict[str, float]:
    """Returns the median time of each form, the two taken in turns."""
    random = np.random.default_rng(0)
    img_BE, txt_BE = random.normal(size=(2, pairs, width)).astype(np.float32)
    arguments = [jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (img_BE, txt_BE)]
    arguments += [jnp.float32(1 / 0.07), jnp.ones(pairs, bool)]
    times = {form: [] for form in programs}
    for _ in range(ROUNDS + 1):
        for form, compiled in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times[form].append(time.perf_counter() - start)
    return {form: statistics.median(of_form[1:]) for form, of_form in times.items()}


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16384)
    pairs = parser.parse_args().pairs
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    console = rich.console.Console()

    speed = rich.table.Table(title=f"{pairs:,} pairs on one device, value and gradients")
    for heading in ("width", "dense, s", "ring, s", "ring / dense", "dense, GB", "ring, GB"):
        speed.add_column(heading, justify="right")
    for width in rich.progress.track(WIDTHS, "widths", console=console):
        programs = {form: program(form, pairs, width, 1) for form in FORMS}
        taken = seconds(programs, pairs, width)
        memory = {form: compiled.memory_analysis().temp_size_in_bytes for form, compiled in programs.items()}
        ratio = taken["ring"] / taken["dense"]
        cells = [f"{taken[form]:.2f}" for form in FORMS] + [f"{ratio:.2f}"]
        speed.add_row(str(width), *cells, *[f"{memory[form] / 1e9:.2f}" for form in FORMS])
    console.print(speed)

    growth = rich.table.Table(title="the ring on 8 devices, width 768: temporary memory a device")
    growth.add_column("pairs", justify="right")
    growth.add_column("GB", justify="right")
    for batch in rich.progress.track(MEMORY_BATCHES, "batches", console=console):
        growth.add_row(f"{batch:,}", f"{program('ring', batch, 768, 8).memory_analysis().temp_size_in_bytes / 1e9:.3f}")
    console.print(growth)


if __name__ == "__main__":
    main()
