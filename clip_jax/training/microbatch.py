"""Any batch on any memory: the towers go over it part by part, the loss over the embeddings of all (arXiv 2101.06983).

Activations of one part are there at a time: the backward pass computes them again (`jax.checkpoint`), so that autodiff
does by itself what is known as gradient caching, with exactly the gradients of the whole batch. Only batch norm can
tell: its batch is the part, over all devices.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clip_jax.errors import UserError
from clip_jax.models.clip import Params, Weights
from clip_jax.typing import Batch

Embeddings = tuple[jax.Array, jax.Array]  # image and text, [B E] each
Encode = Callable[[Weights, Batch, jax.Array | None], tuple[Embeddings, Params]]  # and new statistics


def in_parts(encode: Encode, parts: int, mesh: Mesh) -> Encode:
    """Returns a function that does what `encode` does, in so many parts of the batch, one after the other.

    `encode(weights, batch, rows_B)` gives embeddings and new statistics; what is random about a pair has to come from
    its row in the global batch, so that it is the same in any part, and again in the backward pass.

    Every device cuts its own rows: no image travels. Where parameters are replicated over the `data` axis, each device
    adds its gradients up over the parts and they are reduced once, at the end: the axis is manual here (`shard_map`),
    and parameters are made different in name on each device before the loop. Over the `fsdp` axis parameters are
    gathered, and gradients reduced and scattered, in every part: a device has no room for more than its share. With
    batch norm all is left to the compiler, which reduces gradients in every part, as it has to reduce the statistics.
    """
    if parts == 1:
        return encode

    def whole(weights: Weights, batch: Batch, rows_B: jax.Array) -> tuple[Embeddings, Params]:
        if weights.statistics or mesh.shape["data"] == 1:
            return _one_after_the_other(encode, parts, weights, (batch, rows_B))

        def on_device(weights: Weights, batch: Batch, rows: jax.Array) -> Embeddings:
            weights = jax.lax.pcast(weights, ("data",), to="varying")  # here, not where used: reduced once
            return _one_after_the_other(encode, parts, weights, (batch, rows))[0]

        local = jax.shard_map(
            on_device, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"), axis_names={"data"}
        )
        return local(weights, batch, rows_B), weights.statistics

    return whole


def _one_after_the_other(encode: Encode, parts: int, weights: Weights, rows: tuple) -> tuple[Embeddings, Params]:
    """Returns what `encode` makes of rows, part by part; the statistics go through all of them."""

    def cut(x_B: jax.Array) -> jax.Array:
        # Neighbours go into different parts: rows of a device are neighbours, and each part has some of every device.
        return x_B.reshape(-1, parts, *x_B.shape[1:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    @jax.checkpoint
    def one(statistics: Params, part: tuple) -> tuple[Params, Embeddings]:
        embeddings, statistics = encode(Weights(weights.params, statistics), *part)
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
