"""How the loss grows with the batch and the chips, on paper and by the TPU's compiler, beside the towers' time.

    python -m clip_jax.planning.growth [--generation=v5p] [--batches=4096,…] [--chips=8,…]
        [--loss=softmax|sigmoid] [--form=auto|dense|ring]

Prints a table in Markdown. The loss and its gradients are compiled alone; seconds a size.
"""

import dataclasses
from typing import Any

from absl import flags

from clip_jax import command, flops
from clip_jax.errors import UserError
from clip_jax.planning import topology
from clip_jax.planning.topology import Topology

GENERATION = flags.DEFINE_string("generation", "v5p", "of TPU: v4, v5e, v5p, v6e")
BATCHES = flags.DEFINE_list("batches", ["4096", "32768", "1048576"], "global batches")
CHIPS = flags.DEFINE_list("chips", ["8", "256", "2048"], "sizes of slices")
LOSS = flags.DEFINE_enum("loss", "softmax", ["softmax", "sigmoid"], "which loss")
FORM = flags.DEFINE_enum("form", "auto", ["auto", "dense", "ring"], "in which form, as loss.form of a config")
TOWERS = flags.DEFINE_string("towers", "ViT-L/14", "whose towers stand beside it, and its embed_dim")
TOWERS_MFU = flags.DEFINE_float("towers_mfu", 0.4, "share of the peak that the towers are taken to reach")

PASSES = 6  # products of bfloat16 that a product of float32 at full precision is made of
RING_ARRAYS = 8  # [rows, E]: both embeddings and their gradients, texts and gradients that come and go
DENSE_ARRAYS = 3  # [batch, E]: texts and two gradients; beside them a row of logits for each row


@dataclasses.dataclass(frozen=True)
class Growth:
    """The loss of one size; seconds a step, bytes a chip."""

    batch: int
    chips: int
    form: str  # ring or dense
    seconds: float  # by the compiler's estimate
    link_seconds: float  # what its messages take at full speed, not overlapped
    bytes: int  # embeddings, gradients and temporaries
    paper_seconds: float
    paper_bytes: int


def measure(place: Topology, batch: int, embed_dim: int, loss: str, form: str) -> Growth:
    """Returns the growth of one size."""
    form, compiled = compile_loss(place, batch, embed_dim, loss, form)
    paper_seconds, paper_bytes = on_paper(place, batch, embed_dim, ring=form == "ring")
    return Growth(
        batch=batch,
        chips=place.chips,
        form=form,
        seconds=compiled.text.cycles() / place.generation.clock,
        link_seconds=sum(map(place.generation.link_seconds, compiled.text.collectives())),
        bytes=compiled.used - compiled.code,
        paper_seconds=paper_seconds,
        paper_bytes=paper_bytes,
    )


def on_paper(place: Topology, batch: int, embed_dim: int, *, ring: bool) -> tuple[float, int]:
    """Returns (seconds of the loss's products at the chips' peak, bytes a chip of its arrays), in float32."""
    rows = batch // place.chips
    seconds = PASSES * flops.of_loss(rows, batch, embed_dim, ring=ring) / place.generation.peak
    return seconds, 4 * (RING_ARRAYS * rows * embed_dim if ring else DENSE_ARRAYS * batch * embed_dim + rows * batch)


def compile_loss(place: Topology, batch: int, embed_dim: int, loss: str, form: str) -> tuple[str, Any]:
    """Returns the form on all chips, and the compiled (embeddings, scale, bias, valid) → (loss, gradients)."""
    devices = topology.devices(place)
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from clip_jax import losses, sharding
    from clip_jax.config import LossConfig, MeshConfig
    from clip_jax.planning import compiler

    mesh = sharding.make_mesh(MeshConfig(), devices)
    ring = losses.ring_for(LossConfig(form), mesh, sharding.BATCH_AXES, batch)

    def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        spec = sharding.BATCH if sizes else P()
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def value(img_BE, txt_BE, scale, bias, valid_B):
        if loss == "softmax":
            return losses.softmax(img_BE, txt_BE, scale=scale, valid_B=valid_B, ring=ring).loss
        return losses.sigmoid(img_BE, txt_BE, scale=scale, bias=bias, valid_B=valid_B, ring=ring).loss

    embeddings = shape(batch, embed_dim)
    differentiate = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)))
    lowered = differentiate.lower(embeddings, embeddings, shape(), shape(), shape(batch, dtype=bool))
    return "dense" if ring is None else "ring", compiler.compiled(lowered)


HEAD = """\
| batch | chips | pairs a chip | form | loss | on paper | messages | towers, on paper | loss / towers | \
memory a chip | on paper |
|---|---|---|---|---|---|---|---|---|---|---|"""


def row(growth: Growth, towers_seconds: float) -> str:
    """Returns a line of the table."""
    from clip_jax.planning.report import duration, size

    cells = (
        f"{growth.batch:,}",
        f"{growth.chips:,}",
        f"{growth.batch // growth.chips:,}",
        growth.form,
        duration(growth.seconds),
        duration(growth.paper_seconds),
        duration(growth.link_seconds),
        duration(towers_seconds),
        f"{100 * growth.seconds / towers_seconds:.1f} %",
        size(growth.bytes),
        size(growth.paper_bytes),
    )
    return f"| {' | '.join(cells)} |"


def whole_numbers(name: str, words: list[str]) -> list[int]:
    """Returns the numbers of a flag."""
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise UserError(f"--{name}={','.join(words)} should be positive whole numbers, with commas between them")
    return [int(word) for word in words]


def main() -> None:
    if GENERATION.value not in topology.GENERATIONS:
        known = ", ".join(topology.GENERATIONS)
        raise UserError(f"--generation={GENERATION.value}: there are {known}")
    batches, chips = whole_numbers("batches", BATCHES.value), whole_numbers("chips", CHIPS.value)
    places = [topology.of_size(topology.GENERATIONS[GENERATION.value], count) for count in chips]
    for batch in batches:
        for place in places:
            if batch % place.chips:
                raise UserError(f"--batches: {batch} cannot be split over {place.chips} chips")
    if not 0 < TOWERS_MFU.value <= 1:
        raise UserError(f"--towers_mfu={TOWERS_MFU.value} should be above 0, and 1 at most")
    topology.prepare_environment()  # before jax is there
    import rich.console

    from clip_jax.errors import nearest
    from clip_jax.models.variants import VARIANTS

    if TOWERS.value not in VARIANTS:
        raise UserError(f"--towers={TOWERS.value}: no such model{nearest(TOWERS.value, VARIANTS)}")
    towers = VARIANTS[TOWERS.value]
    progress = rich.console.Console(stderr=True)
    print(HEAD, flush=True)
    for batch in batches:
        for place in places:
            with progress.status(f"compiling the loss of {batch:,} pairs for {place.name}"):
                grown = measure(place, batch, towers.embed_dim, LOSS.value, FORM.value)
            towers_flops = batch // place.chips * flops.of_pair(towers).training()
            print(row(grown, towers_flops / (TOWERS_MFU.value * place.generation.peak)), flush=True)


if __name__ == "__main__":
    command.run(main)
