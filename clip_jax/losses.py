"""The contrastive losses: normalised embeddings of the global batch in, one number out, and beside it how many pairs
have found each other. They know no model.

Softmax (InfoNCE; CLIP, arXiv 2103.00020) and sigmoid (SigLIP, arXiv 2303.15343), each in two forms that give the same
number and the same gradients, in float32 or wider when the embeddings are:

- dense: all B×B logits at once, a few lines that can be checked by eye. It is the oracle of the other.
- ring: images stay on their device, texts travel from device to device until they are home again. Each meeting of a
  block of images with a block of texts is computed in tiles, and again in the backward pass instead of being kept:
  memory grows with B, not with B².

A pair that is not valid is neither a positive nor anybody's negative: the result is that of the batch without it.
Without any valid pair it is 0.

An image has found its text when no other text of the batch is as near to it; a text its image likewise. Equals are not
told apart: a collapsed model finds nothing. The forward pass has all it takes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clip_jax.config import LossConfig
from clip_jax.errors import UserError
from clip_jax.typing import Bool, Float

# Stands for "not there" among logits: far below every scaled cosine, and finite, so that a row without a single valid
# partner has a finite value (which is then not counted) and a gradient of zero instead of NaN.
ABSENT = -1e30

TILE = 1024  # rows and columns: 4 MB of logits, which stay in the cache of a core and fill a matrix unit

# What `auto` takes the dense form for: on many devices that is one gathering of texts, where a ring has two hops a
# device, and each takes its time.
DENSE_LOGITS = 4096**2  # a device: 64 MB, and five times that for what is made of them
DENSE_PAIRS = 65_536  # in all: texts and two gradients that are whole on every device, 0.6 GB at width 768

HIGHEST = jax.lax.Precision.HIGHEST  # else a TPU multiplies float32 as bfloat16: cosines would be off by 2^-8


class Contrast(NamedTuple):
    """What comes of contrasting the pairs of a global batch."""

    loss: Float[jax.Array, ""]
    image_to_text_accuracy: Float[jax.Array, ""]  # share of valid pairs whose image has found its text
    text_to_image_accuracy: Float[jax.Array, ""]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Who takes part in the ring, and how blocks are cut."""

    mesh: Mesh
    axes: tuple[str, ...]  # of the mesh: the batch is split over them, and the ring goes around them
    tile: int  # rows and columns of logits that are there at once; a block is padded to a multiple of it


def ring_for(config: LossConfig, mesh: Mesh, axes: tuple[str, ...], global_batch: int) -> Ring | None:
    """Returns the ring of a run, or None where the loss is dense.

    `auto` is dense up to DENSE_PAIRS pairs and DENSE_LOGITS logits a device, unless a tile is given.

    Raises:
        UserError: the tile is larger than what a device has.
    """
    form, rows = config.form, global_batch // math.prod(mesh.shape[axis] for axis in axes)
    if form == "auto":
        few = rows * global_batch <= DENSE_LOGITS and global_batch <= DENSE_PAIRS
        form = "dense" if few and config.tile is None else "ring"
    if form == "dense":
        return None
    if config.tile is not None and config.tile > rows:
        raise UserError(
            f"loss.tile={config.tile} is larger than a device's block of {rows} pairs "
            f"(data.global_batch={global_batch} on {dict(mesh.shape)}); leave it out, or make it {rows} at most"
        )
    return Ring(mesh, axes, config.tile or tile_of(rows))


def tile_of(rows: int) -> int:
    """Returns the tile that cuts a block of so many rows into equal ones, of TILE at most."""
    return math.ceil(rows / math.ceil(rows / TILE))


def ring_size(ring: Ring) -> int:
    """Returns the number of devices that the texts pass."""
    return math.prod(ring.mesh.shape[axis] for axis in ring.axes)


def softmax(
    img_BE: Float[jax.Array, "B E"],
    txt_BE: Float[jax.Array, "B E"],
    *,
    scale: Float[jax.Array, ""],
    valid_B: Bool[jax.Array, " B"],
    ring: Ring | None = None,
) -> Contrast:
    """Returns the symmetric InfoNCE loss, averaged over valid pairs (CLIP, arXiv 2103.00020, figure 3), and who found.

    A row costs log Σⱼ exp lᵢⱼ − lᵢᵢ, written as log(1 + Σ_{j≠i} exp(lᵢⱼ − lᵢᵢ)): the same number, without the
    difference of two large ones that would be all rounding once a model has learnt its pairs.
    """
    img_BE, txt_BE, scale = _widened(img_BE, txt_BE, scale, valid_B)
    if ring is not None:
        return _contrast(*_softmax_costs(ring, img_BE, txt_BE, scale, valid_B), valid_B)
    cosines_BB = _matmul(img_BE, txt_BE.T)
    positive_B = jnp.diagonal(cosines_BB)
    negative_BB = valid_B[:, None] & valid_B & ~jnp.eye(len(valid_B), dtype=bool)

    def cost(margin_BB: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        logits_BB = jnp.where(negative_BB, scale * margin_BB, ABSENT)
        return jax.nn.softplus(jax.nn.logsumexp(logits_BB, axis=axis)), _found(logits_BB.max(axis), scale, img_BE)

    image_to_text_B, text_found_B = cost(cosines_BB - positive_B[:, None], axis=1)
    text_to_image_B, image_found_B = cost(cosines_BB - positive_B, axis=0)
    return _contrast((image_to_text_B + text_to_image_B) / 2, text_found_B, image_found_B, valid_B)


def sigmoid(
    img_BE: Float[jax.Array, "B E"],
    txt_BE: Float[jax.Array, "B E"],
    *,
    scale: Float[jax.Array, ""],
    bias: Float[jax.Array, ""],
    valid_B: Bool[jax.Array, " B"],
    ring: Ring | None = None,
) -> Contrast:
    """Returns the sum of −log σ(±(scale·cosine + bias)) over all combinations, + for pairs and − for others, over the
    number of valid pairs (SigLIP, arXiv 2303.15343, equation 1 and algorithm 1), and who found."""
    img_BE, txt_BE, scale, bias = *_widened(img_BE, txt_BE, scale, valid_B), bias.astype(img_BE.dtype)
    if ring is not None:
        return _contrast(*_sigmoid_costs(ring, img_BE, txt_BE, scale, bias, valid_B), valid_B)
    cosines_BB = _matmul(img_BE, txt_BE.T)
    logits_BB, own_BB = scale * cosines_BB + bias, jnp.eye(len(valid_B), dtype=bool)
    there_BB = valid_B[:, None] & valid_B
    cost_BB = jax.nn.softplus(jnp.where(own_BB, -logits_BB, logits_BB))
    others_BB = jnp.where(there_BB & ~own_BB, cosines_BB, ABSENT)
    found = (_found(others_BB.max(axis) - jnp.diagonal(cosines_BB), 1.0, img_BE) for axis in (1, 0))
    return _contrast(jnp.where(there_BB, cost_BB, 0).sum(1), *found, valid_B)


def _widened(img_BE: jax.Array, txt_BE: jax.Array, scale: jax.Array, valid_B: jax.Array) -> tuple[jax.Array, ...]:
    """Returns both embeddings and the scale in the dtype of the loss; what is not valid may have been NaN."""
    dtype = jnp.promote_types(jnp.result_type(img_BE, txt_BE), jnp.float32)
    img_BE, txt_BE = (jnp.where(valid_B[:, None], x, 0).astype(dtype) for x in (img_BE, txt_BE))
    return img_BE, txt_BE, scale.astype(dtype)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=HIGHEST)


def _found(margin: jax.Array, scale: jax.Array | float, img: jax.Array) -> jax.Array:
    """Returns whether the nearest other is further off than a pair's own, given scale · (its cosine − the own one).

    By more than rounding: a cosine of E terms is known to about √E/2 eps, and equals may come out a little different.
    """
    return margin < -scale * math.sqrt(img.shape[-1]) * jnp.finfo(img.dtype).eps


def _contrast(cost_B: jax.Array, text_found_B: jax.Array, image_found_B: jax.Array, valid_B: jax.Array) -> Contrast:
    """Returns the means over valid pairs; 0 where there is none."""
    return Contrast(*(_mean(x_B, valid_B) for x_B in (cost_B, text_found_B, image_found_B)))


def _mean(cost_B: jax.Array, valid_B: jax.Array) -> jax.Array:
    """Returns the mean over valid pairs; 0 where there is none."""
    return jnp.where(valid_B, cost_B, 0).sum() / jnp.maximum(valid_B.sum(), 1)


# --- the ring -------------------------------------------------------------------------------------------------------
# What `_on_devices` is given runs on one device: n pairs of its own, cut into R tiles of t. Arrays are [R, t, …]; trees
# of them are indexed together.

Tree = Any


def _meet_all(
    ring: Ring, visit: Callable, images: Tree, texts: Tree, valid_Rt: jax.Array, stays: Tree, rides: Tree
) -> tuple[Tree, Tree]:
    """Returns what has been added up when every tile of images has met every tile of texts in the ring once.

    `visit(image, text, there_tu, stay, ride)` returns the new (stay, ride): `stays` belongs to the images and stays at
    home with them; `rides` travels with the texts, and is home again in the end. `there_tu` is False where one of the
    two is not valid, and where an image meets its own text: pairs are no negatives, and are seen to at home.
    """
    hops, tiles = ring_size(ring), len(valid_Rt)
    following = [(i, (i + 1) % hops) for i in range(hops)]
    diagonal_tu = jnp.eye(valid_Rt.shape[1], dtype=bool)

    def hop(carry, number):
        stays, rides, texts, text_valid_Rt = carry
        # Sent first: while they are under way, the meeting is computed.
        arriving = _send((texts, text_valid_Rt), ring.axes, following)

        def meet(k, added):
            stays, rides = added
            i, j = k // tiles, k % tiles
            stay, ride = _at(stays, i), _at(rides, j)
            there_tu = valid_Rt[i][:, None] & text_valid_Rt[j] & ~((number == 0) & (i == j) & diagonal_tu)
            stay, ride = visit(_at(images, i), _at(texts, j), there_tu, stay, ride)
            return _put(stays, i, stay), _put(rides, j, ride)

        stays, rides = jax.lax.fori_loop(0, tiles**2, meet, (stays, rides))
        return (stays, _send(rides, ring.axes, following), *arriving), None

    carry = (stays, rides, texts, valid_Rt)
    return jax.lax.scan(hop, carry, jnp.arange(hops))[0][:2]


def _send(tree: Tree, axes: tuple[str, ...], to: list[tuple[int, int]]) -> Tree:
    return tree if len(to) == 1 else jax.lax.ppermute(tree, axes, to)


def _at(tree: Tree, i: jax.Array) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Tree, i: jax.Array, part: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, part)


def _on_devices(ring: Ring, function: Callable, *arrays: Tree) -> Any:
    """Returns `function` of every device's rows of the arrays, tiled, as rows of global arrays; scalars are given to
    every device."""

    def tiled(x: jax.Array) -> jax.Array:
        if not x.ndim:
            return x
        rows = [(0, -len(x) % ring.tile)] + [(0, 0)] * (x.ndim - 1)  # those added are not valid: False is 0
        return jnp.pad(x, rows).reshape(-1, ring.tile, *x.shape[1:])

    def run(*local: Tree) -> Any:
        rows = len(local[0])
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], function(*jax.tree.map(tiled, local)))

    in_specs = jax.tree.map(lambda x: P(ring.axes) if x.ndim else P(), arrays)
    return jax.shard_map(run, mesh=ring.mesh, in_specs=in_specs, out_specs=P(ring.axes))(*arrays)


def _gradients(img_RtE, txt_RtE, scale, own_Rt, img_gradient_RtE, txt_gradient_RtE) -> tuple[jax.Array, ...]:
    """Returns the gradients of the embeddings and of the scale, the last by pair.

    Given are those of the pairs' own logits, and what the others' amount to, Σⱼ ∂ᵢⱼ textⱼ and Σᵢ ∂ᵢⱼ imageᵢ. A logit is
    scale·cosine, so Σⱼ ∂ᵢⱼ cosineᵢⱼ, the gradient of the scale, is the image times what it has gathered.
    """
    img_gradient_RtE = img_gradient_RtE + own_Rt[..., None] * txt_RtE
    txt_gradient_RtE = txt_gradient_RtE + own_Rt[..., None] * img_RtE
    return scale * img_gradient_RtE, scale * txt_gradient_RtE, (img_gradient_RtE * img_RtE).sum(-1)


# --- softmax in the ring --------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """What the negatives of rows, or of columns, amount to so far.

    They are summed relative to the largest logit of all, the pair's own included. A fixed one would not do: at scale
    100 margins span 200, and exp in float32 underflows at −104.
    """

    nearest: jax.Array  # the largest margin lᵢⱼ − lᵢᵢ
    total: jax.Array  # Σ_{j≠i} exp(margin − top)

    @classmethod
    def none(cls, like: jax.Array) -> "Sums":
        return cls(jnp.full_like(like, ABSENT), jnp.zeros_like(like))

    @property
    def top(self) -> jax.Array:
        """Returns the largest margin, but never below that of the pair itself, which is 0."""
        return jnp.maximum(self.nearest, 0)

    def with_more(self, margin_tu: jax.Array, axis: int) -> "Sums":
        """Returns them with more margins."""
        sums = Sums(jnp.maximum(self.nearest, margin_tu.max(axis)), self.total)
        more = jnp.exp(margin_tu - jnp.expand_dims(sums.top, axis)).sum(axis)
        return sums._replace(total=self.total * jnp.exp(self.top - sums.top) + more)

    def cost(self) -> jax.Array:
        """Returns log(1 + Σ exp margin)."""
        return jnp.where(self.top > 0, self.top + jnp.log(self.total + jnp.exp(-self.top)), jnp.log1p(self.total))

    def weight(self, gradient: jax.Array) -> jax.Array:
        """Returns what exp(margin − top), times this, gives the gradient of a margin, from that of the cost."""
        return gradient / (self.total + jnp.exp(-self.top))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_costs(ring: Ring, img_BE, txt_BE, scale, valid_B) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what each pair costs, the mean of its row's and its column's −log softmax; whether its image has found
    the text, and its text the image."""
    return _softmax_forward(ring, img_BE, txt_BE, scale, valid_B)[0]


def _softmax_forward(ring: Ring, img_BE, txt_BE, scale, valid_B):
    def forward(img_RtE, txt_RtE, valid_Rt, scale):
        positive_Rt = (img_RtE * txt_RtE).sum(-1)

        def visit(image, text, there_tu, row, column):
            (img_tE, positive_t), (txt_uE, positive_u) = image, text
            cosines_tu = _matmul(img_tE, txt_uE.T)
            row = row.with_more(jnp.where(there_tu, scale * (cosines_tu - positive_t[:, None]), ABSENT), axis=1)
            column = column.with_more(jnp.where(there_tu, scale * (cosines_tu - positive_u), ABSENT), axis=0)
            return row, column

        sums = Sums.none(positive_Rt)
        row, column = _meet_all(ring, visit, (img_RtE, positive_Rt), (txt_RtE, positive_Rt), valid_Rt, sums, sums)
        found = (_found(sums.nearest, scale, img_RtE) for sums in (row, column))
        return ((row.cost() + column.cost()) / 2, *found), (positive_Rt, row, column)

    costs, known = _on_devices(ring, forward, img_BE, txt_BE, valid_B, scale)
    return costs, (img_BE, txt_BE, scale, valid_B, known)


def _softmax_backward(ring: Ring, residuals, gradients):
    cost_gradient_B, *_ = gradients  # who found has none
    img_BE, txt_BE, scale, valid_B, known = residuals

    def backward(img_RtE, txt_RtE, valid_Rt, gradient_Rt, known, scale):
        positive_Rt, row, column = known
        row_weight_Rt, column_weight_Rt = row.weight(gradient_Rt / 2), column.weight(gradient_Rt / 2)

        def visit(image, text, there_tu, img_gradient_tE, txt_gradient_uE):
            img_tE, positive_t, top_t, weight_t = image
            txt_uE, positive_u, top_u, weight_u = text
            cosines_tu = _matmul(img_tE, txt_uE.T)
            row_tu = jnp.where(there_tu, scale * (cosines_tu - positive_t[:, None]), ABSENT) - top_t[:, None]
            column_tu = jnp.where(there_tu, scale * (cosines_tu - positive_u), ABSENT) - top_u
            share_tu = jnp.exp(row_tu) * weight_t[:, None] + jnp.exp(column_tu) * weight_u
            img_gradient_tE = img_gradient_tE + _matmul(share_tu, txt_uE)
            return img_gradient_tE, txt_gradient_uE + _matmul(share_tu.T, img_tE)

        images = (img_RtE, positive_Rt, row.top, row_weight_Rt)
        texts = (txt_RtE, positive_Rt, column.top, column_weight_Rt)
        none_RtE = jnp.zeros_like(img_RtE)
        others = _meet_all(ring, visit, images, texts, valid_Rt, none_RtE, none_RtE)
        # Every margin has the pair's own logit in it, with a minus: what the others gain it loses.
        own_Rt = -(row_weight_Rt * row.total + column_weight_Rt * column.total)
        return _gradients(img_RtE, txt_RtE, scale, own_Rt, *others)

    arrays = (img_BE, txt_BE, valid_B, cost_gradient_B, known, scale)
    img_gradient_BE, txt_gradient_BE, scale_gradient_B = _on_devices(ring, backward, *arrays)
    return img_gradient_BE, txt_gradient_BE, scale_gradient_B.sum(), None


_softmax_costs.defvjp(_softmax_forward, _softmax_backward)


# --- sigmoid in the ring --------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sigmoid_costs(ring: Ring, img_BE, txt_BE, scale, bias, valid_B) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what each image costs, −log σ(l) with its own text, −log σ(−l) with all others; whether it has found its
    text, and its text the image."""
    return _sigmoid_forward(ring, img_BE, txt_BE, scale, bias, valid_B)[0]


def _sigmoid_forward(ring: Ring, img_BE, txt_BE, scale, bias, valid_B):
    def forward(img_RtE, txt_RtE, valid_Rt, scale, bias):
        positive_Rt = (img_RtE * txt_RtE).sum(-1)

        def visit(image, text, there_tu, stay, nearest_u):
            (img_tE, positive_t), (txt_uE, positive_u), (cost_t, nearest_t) = image, text, stay
            cosines_tu = _matmul(img_tE, txt_uE.T)
            cost_t = cost_t + jax.nn.softplus(jnp.where(there_tu, scale * cosines_tu + bias, ABSENT)).sum(1)
            others_tu = jnp.where(there_tu, cosines_tu, ABSENT)
            nearest_t = jnp.maximum(nearest_t, others_tu.max(1) - positive_t)
            return (cost_t, nearest_t), jnp.maximum(nearest_u, others_tu.max(0) - positive_u)

        cost_Rt = jax.nn.softplus(-(scale * positive_Rt + bias))
        absent_Rt = jnp.full_like(positive_Rt, ABSENT)
        images, texts = (img_RtE, positive_Rt), (txt_RtE, positive_Rt)
        (cost_Rt, row_Rt), column_Rt = _meet_all(ring, visit, images, texts, valid_Rt, (cost_Rt, absent_Rt), absent_Rt)
        return cost_Rt, *(_found(nearest_Rt, 1.0, img_RtE) for nearest_Rt in (row_Rt, column_Rt))

    costs = _on_devices(ring, forward, img_BE, txt_BE, valid_B, scale, bias)
    return costs, (img_BE, txt_BE, scale, bias, valid_B)


def _sigmoid_backward(ring: Ring, residuals, gradients):
    cost_gradient_B, *_ = gradients  # who found has none
    img_BE, txt_BE, scale, bias, valid_B = residuals

    def backward(img_RtE, txt_RtE, valid_Rt, gradient_Rt, scale, bias):
        def visit(image, txt_uE, there_tu, stay, txt_gradient_uE):
            (img_tE, gradient_t), (img_gradient_tE, bias_gradient_t) = image, stay
            logits_tu = scale * _matmul(img_tE, txt_uE.T) + bias
            share_tu = jax.nn.sigmoid(jnp.where(there_tu, logits_tu, ABSENT)) * gradient_t[:, None]
            stay = (img_gradient_tE + _matmul(share_tu, txt_uE), bias_gradient_t + share_tu.sum(1))
            return stay, txt_gradient_uE + _matmul(share_tu.T, img_tE)

        own_Rt = -gradient_Rt * jax.nn.sigmoid(-scale * (img_RtE * txt_RtE).sum(-1) - bias)
        none_Rt, none_RtE = jnp.zeros_like(own_Rt), jnp.zeros_like(img_RtE)
        (img_gradient, bias_gradient_Rt), txt_gradient = _meet_all(
            ring, visit, (img_RtE, gradient_Rt), txt_RtE, valid_Rt, (none_RtE, none_Rt), none_RtE
        )
        return *_gradients(img_RtE, txt_RtE, scale, own_Rt, img_gradient, txt_gradient), bias_gradient_Rt + own_Rt

    arrays = (img_BE, txt_BE, valid_B, cost_gradient_B, scale, bias)
    img_gradient_BE, txt_gradient_BE, scale_gradient_B, bias_gradient_B = _on_devices(ring, backward, *arrays)
    return img_gradient_BE, txt_gradient_BE, scale_gradient_B.sum(), bias_gradient_B.sum(), None


_sigmoid_costs.defvjp(_sigmoid_forward, _sigmoid_backward)
