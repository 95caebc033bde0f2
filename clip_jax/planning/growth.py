"""How the loss grows with the batch and the chips, on paper and by the TPU's compiler, beside the towers' time.

    python -m clip_jax.planning.growth [--generation=v5p] [--batches=4096,…] [--chips=8,…] [--loss=softmax|sigmoid]

Prints a table in Markdown. The loss and its gradients are compiled alone, in the ring; seconds a size.
"""

import dataclasses

from absl import flags

from clip_jax import command
from clip_jax.errors import UserError
from clip_jax.planning import flops, topology
from clip_jax.planning.topology import Topology

GENERATION = flags.DEFINE_string("generation", "v5p", "of TPU: v4, v5e, v5p, v6e")
BATCHES = flags.DEFINE_list("batches", ["4096", "32768", "1048576"], "global batches")
CHIPS = flags.DEFINE_list("chips", ["8", "256", "2048"], "sizes of slices")
LOSS = flags.DEFINE_enum("loss", "softmax", ["softmax", "sigmoid"], "which loss")
TOWERS = flags.DEFINE_string("towers", "ViT-L/14", "whose towers stand beside it, and its embed_dim")
TOWERS_MFU = flags.DEFINE_float("towers_mfu", 0.4, "share of the peak that the towers are taken to reach")

PASSES = 6  # products of bfloat16 that a product of float32 at full precision is made of
ARRAYS = 8  # [rows, E] in float32: both embeddings and their gradients, texts and gradients that come and go


@dataclasses.dataclass(frozen=True)
class Growth:
    """The loss of one size; seconds a step, bytes a chip."""

    batch: int
    chips: int
    seconds: float  # by the compiler's estimate
    link_seconds: float  # what the ring's messages take at full speed, not overlapped
    bytes: int  # embeddings, gradients and temporaries
    paper_seconds: float
    paper_bytes: int
    towers_seconds: float  # on paper


def measure(place: Topology, batch: int, loss: str, variant: str, towers_mfu: float) -> Growth:
    """Returns the growth of one size."""
    from clip_jax.models.variants import VARIANTS

    architecture, rows = VARIANTS[variant], batch // place.chips
    compiled = compile_loss(place, batch, architecture.embed_dim, loss)
    paper_seconds, paper_bytes = on_paper(place, batch, architecture.embed_dim)
    towers = rows * flops.of_pair(architecture).training
    return Growth(
        batch=batch,
        chips=place.chips,
        seconds=compiled.text.cycles() / place.generation.clock,
        link_seconds=sum(map(place.generation.link_seconds, compiled.text.collectives())),
        bytes=compiled.used - compiled.code,
        paper_seconds=paper_seconds,
        paper_bytes=paper_bytes,
        towers_seconds=towers / (towers_mfu * place.generation.peak),
    )


def on_paper(place: Topology, batch: int, embed_dim: int) -> tuple[float, int]:
    """Returns (seconds of the loss's products at the chips' peak, bytes a chip of what has a row for each pair)."""
    rows = batch // place.chips
    seconds = PASSES * flops.of_loss(rows, batch, embed_dim) / place.generation.peak
    return seconds, ARRAYS * rows * embed_dim * 4


def compile_loss(place: Topology, batch: int, embed_dim: int, loss: str):
    """Returns the compiled (embeddings, scale, bias, valid) → (loss, gradients), in the ring of all chips."""
    devices = topology.devices(place)
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from clip_jax import losses, sharding
    from clip_jax.config import LossConfig, MeshConfig
    from clip_jax.planning import compiler

    mesh = sharding.make_mesh(MeshConfig(), devices)
    ring = losses.ring_for(LossConfig(form="ring"), mesh, sharding.BATCH_AXES, batch)

    def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        spec = sharding.BATCH if sizes else P()
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def value(img_BE, txt_BE, scale, bias, valid_B):
        if loss == "softmax":
            return losses.softmax(img_BE, txt_BE, scale=scale, valid_B=valid_B, ring=ring)
        return losses.sigmoid(img_BE, txt_BE, scale=scale, bias=bias, valid_B=valid_B, ring=ring)

    embeddings = shape(batch, embed_dim)
    differentiate = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)))
    return compiler.compiled(differentiate.lower(embeddings, embeddings, shape(), shape(), shape(batch, dtype=bool)))


HEAD = """\
| batch | chips | pairs a chip | loss | on paper | ring's messages | towers, on paper | loss / towers | \
memory a chip | on paper |
|---|---|---|---|---|---|---|---|---|---|"""


def row(growth: Growth) -> str:
    """Returns a line of the table."""
    from clip_jax.planning.report import duration, size

    cells = (
        f"{growth.batch:,}",
        f"{growth.chips:,}",
        f"{growth.batch // growth.chips:,}",
        duration(growth.seconds),
        duration(growth.paper_seconds),
        duration(growth.link_seconds),
        duration(growth.towers_seconds),
        f"{100 * growth.seconds / growth.towers_seconds:.1f} %",
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
    progress = rich.console.Console(stderr=True)
    print(HEAD, flush=True)
    for batch in batches:
        for place in places:
            with progress.status(f"compiling the loss of {batch:,} pairs for {place.name}"):
                grown = measure(place, batch, LOSS.value, TOWERS.value, TOWERS_MFU.value)
            print(row(grown), flush=True)


if __name__ == "__main__":
    command.run(main)
