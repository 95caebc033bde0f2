"""The optimisers: gradients → directions, which times a learning rate are taken off the parameters.

From Optax where it has them. What counts matrices goes by the table of kinds, so that the blocks of a stack are what
they would be one by one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clip_jax.config import OptimConfig
from clip_jax.optim.parameters import NO_MATRIX, Matrix, Params, by_path, kind_of

Transforms = list[optax.GradientTransformation]


def _adamw(config: OptimConfig) -> Transforms:
    return [optax.scale_by_adam(config.b1, config.b2, config.eps)]


def _lion(config: OptimConfig) -> Transforms:
    return [optax.scale_by_lion(config.b1, config.b2)]


def _adafactor(config: OptimConfig) -> Transforms:
    return [scale_by_adafactor(config.b1, config.b2)]


def _muon(config: OptimConfig) -> Transforms:
    orthogonal = optax.contrib.scale_by_muon(
        beta=config.b1, weight_dimension_numbers=lambda tree: by_path(_numbers, tree)
    )
    ways = {
        "muon": optax.chain(orthogonal, optax.stateless(lambda tree, _: by_path(_as_large_as_adams, tree))),
        "adam": optax.scale_by_adam(config.b1, config.b2, config.eps),
    }
    return [optax.partition(ways, lambda params: by_path(_way, params))]


DIRECTIONS = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}


def _way(path: str, _: Any) -> str:
    return "muon" if kind_of(path).hidden else "adam"


def _numbers(path: str, _: Any) -> optax.contrib.MuonDimensionNumbers:
    return optax.contrib.MuonDimensionNumbers(*kind_of(path).matrix)


def _as_large_as_adams(path: str, direction: jax.Array) -> jax.Array:
    """Returns an orthogonal matrix with a root mean square of 0.2, which AdamW's directions have in practice.

    Its own is 1/√(the larger of its sizes). So AdamW's learning rate and decay hold, whatever the shape
    (arXiv 2502.16982, section 2.2).
    """
    return 0.2 * max(kind_of(path).matrix.sizes(direction.shape)) ** 0.5 * direction


class AdafactorState(NamedTuple):
    """What Adafactor keeps; trees are those of the parameters, with a 1 for each dimension that is averaged over."""

    count: jax.Array  # int32 []
    rows: Params  # mean squares of the gradient over a matrix's outputs
    columns: Params  # and over its inputs; of what is no matrix both are the squares themselves
    momentum: Params  # bfloat16


def scale_by_adafactor(b1: float, b2: float) -> optax.GradientTransformation:
    """Returns big_vision's Adafactor (arXiv 1804.04235; 2106.04560, section 3.4): a second moment of rank one, whose
    decay rises to `b2`, then a momentum in half the memory. Nothing is clipped, no rate is relative."""

    def init(params: Params) -> AdafactorState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        momentum = jax.tree.map(lambda x: x.astype(jnp.bfloat16), zeros)
        return AdafactorState(jnp.zeros((), jnp.int32), by_path(_rows, zeros), by_path(_columns, zeros), momentum)

    def update(gradients: Params, state: AdafactorState, params: Params | None = None) -> tuple[Params, AdafactorState]:
        decay = jnp.minimum(b2, 1 - (state.count + 1.0) ** -0.8)
        squares = jax.tree.map(lambda x: jnp.square(x) + 1e-30, gradients)

        def ahead(before: jax.Array, now: jax.Array) -> jax.Array:
            return decay * before + (1 - decay) * now

        def scaled(path: str, x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
            shares = rows / rows.mean(_factored(path, x).inputs, keepdims=True)
            return x * jax.lax.rsqrt(shares) * jax.lax.rsqrt(columns)

        rows = jax.tree.map(ahead, state.rows, by_path(_rows, squares))
        columns = jax.tree.map(ahead, state.columns, by_path(_columns, squares))
        updates = by_path(scaled, gradients, rows, columns)
        updates = jax.tree.map(lambda m, x: b1 * m.astype(x.dtype) + (1 - b1) * x, state.momentum, updates)
        momentum = jax.tree.map(lambda x: x.astype(jnp.bfloat16), updates)
        return updates, AdafactorState(state.count + 1, rows, columns, momentum)

    return optax.GradientTransformation(init, update)


def _rows(path: str, x: jax.Array) -> jax.Array:
    return x.mean(_factored(path, x).outputs, keepdims=True)


def _columns(path: str, x: jax.Array) -> jax.Array:
    return x.mean(_factored(path, x).inputs, keepdims=True)


def _factored(path: str, x: jax.Array) -> Matrix:
    """Returns as which matrices a parameter counts; with a side under 32 as none, as in big_vision."""
    matrix = kind_of(path).matrix
    return matrix if min(matrix.sizes(x.shape)) >= 32 else NO_MATRIX
