"""Any batch on any memory: the towers go over it part by part, the loss over the embeddings of all (arXiv 2101.06983).

Activations of one part are there at a time: the backward pass computes them again (`jax.checkpoint`), so that autodiff
does by itself what is known as gradient caching, with exactly the gradients of the whole batch. Only batch norm can
tell: its batch is the part, over all devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.errors import UserError
from clip_jax.models.clip import Params, Weights
from clip_jax.sharding import BATCH
from clip_jax.typing import Batch

Embeddings = tuple[jax.Array, jax.Array]  # image and text, [B E] each
# (weights, batch, rows of the global batch, their place on the mesh) → embeddings and new statistics
Encode = Callable[[Weights, Batch, jax.Array, NamedSharding], tuple[Embeddings, Params]]


def in_parts(
    encode: Encode, parts: int, mesh: Mesh
) -> Callable[[Weights, Batch, jax.Array], tuple[Embeddings, Params]]:
    """Returns a function that does what `encode` does, in so many parts of the batch, one after the other.

    What is random about a pair has to come from its row in the global batch, so that it is the same in any part, and
    again in the backward pass.

    Every device cuts its own rows: no image travels. Parameters that are replicated over the `data` axis would have
    their gradients reduced in every part; instead each device adds its own up over the parts, and they are reduced
    once, at the end: the axis is manual (`shard_map`), and parameters count as different on each device before the
    loop begins. Over the `fsdp` axis parameters are gathered, and gradients reduced and scattered, in every part: a
    device has no room for more than its share of them. Left to the compiler, which reduces in every part, are models
    with batch norm, since it has to reduce their statistics there anyway, and meshes with a `tensor` axis, which XLA
    cannot partition beside a manual one.
    """

    def whole(weights: Weights, batch: Batch, rows_B: jax.Array) -> tuple[Embeddings, Params]:
        rows = (batch, rows_B)
        if parts == 1:
            return encode(weights, *rows, NamedSharding(mesh, BATCH))
        if weights.statistics or mesh.shape["data"] == 1 or mesh.shape["tensor"] > 1:
            return _one_after_the_other(encode, parts, weights, rows, NamedSharding(mesh, BATCH))

        def on_device(weights: Weights, *rows: Any) -> Embeddings:
            weights = jax.lax.pcast(weights, ("data",), to="varying")  # here, not where used: reduced once
            within = NamedSharding(jax.sharding.get_abstract_mesh(), P("fsdp"))
            return _one_after_the_other(encode, parts, weights, rows, within)[0]

        places = (P(), P("data"), P("data"))
        local = jax.shard_map(on_device, mesh=mesh, in_specs=places, out_specs=P("data"), axis_names={"data"})
        return local(weights, *rows), weights.statistics

    return whole


def _one_after_the_other(
    encode: Encode, parts: int, weights: Weights, rows: tuple, placed: NamedSharding
) -> tuple[Embeddings, Params]:
    """Returns what `encode` makes of rows, `placed` over devices, part by part; the statistics go through all parts."""

    def stay(x: jax.Array, dim: int) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, placed.update(spec=P(*(None,) * dim, *placed.spec)))

    def cut(x_B: jax.Array) -> jax.Array:
        # A device's rows are neighbours, and each part has some of every device: neighbours go into different parts.
        return stay(stay(x_B.reshape(-1, parts, *x_B.shape[1:]), 0).swapaxes(0, 1), 1)

    def join(x: jax.Array) -> jax.Array:
        return stay(stay(x, 1).swapaxes(0, 1), 0).reshape(-1, *x.shape[2:])

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan keeps the two passes apart
    def one(statistics: Params, part: tuple) -> tuple[Params, Embeddings]:
        embeddings, statistics = encode(Weights(weights.params, statistics), *part, placed)
        return statistics, embeddings

    statistics, embeddings = jax.lax.scan(one, weights.statistics, jax.tree.map(cut, rows))
    return jax.tree.map(join, embeddings), statistics


def check_microbatch(microbatch: int | None, global_batch: int, mesh: Mesh) -> int:
    """Returns into how many parts the global batch is cut.

    Raises:
        UserError: it cannot be cut into parts of that size, of which every device has as many rows.
    """
    if microbatch is None:
        return 1
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if global_batch % microbatch or microbatch % ways:
        fits = [ways * n for n in range(1, global_batch // ways + 1) if global_batch % (ways * n) == 0]
        near = sorted(sorted(fits, key=lambda size: abs(size - microbatch))[:3])
        raise UserError(
            f"microbatch={microbatch} must divide data.global_batch={global_batch} and be a multiple of data × fsdp = "
            f"{ways} devices; the nearest that {'does' if len(near) == 1 else 'do'}: {', '.join(map(str, near))}"
        )
    return global_batch // microbatch
