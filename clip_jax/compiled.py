"""How a loaded model is computed: compiled for a few batch sizes, from weights that lie as the hardware likes them.

Training stacks the blocks and scans them. A CPU would copy each block's weights out of the stack, which at a batch of
one costs as much as the block itself, and it multiplies faster by matrices that lie as [out, in]: on a CPU the blocks
are kept apart, their kernels turned. Accelerators take the stack as it is.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.clip import Definition, Weights
from clip_jax.models.layers import Array
from clip_jax.sharding import path_of
from clip_jax.typing import Float, Int

Placed = Weights  # where blocks are kept apart, a tuple of arrays for each array

# What calls are compiled for: other batches are padded, or done in pieces; captions are cut behind the longest. Where
# reading the weights takes most of the time, a shorter caption gains little, and there are fewer lengths.
BATCH_SIZES = (1, 4, 8, 32, 128)
TEXT_LENGTHS = {1: (32,), 4: (32,), 8: (16, 24, 32, 48), 32: (16, 24, 32, 48), 128: (16, 24, 32, 48)}

# How many dimensions of a kernel meet what comes in.
DIMS_IN = {"attention/qkv/kernel": 1, "attention/out/kernel": 2, "mlp/up/kernel": 1, "mlp/down/kernel": 1}


def place(arrays: Mapping[str, Array], definition: Definition, device: jax.Device | None = None) -> Placed:
    """Returns the weights on a device, made of the arrays by path, each of which is asked for once.

    A dict is emptied on the way, so that none is there twice; other mappings keep none.
    """
    device = device or jax.devices()[0]
    take = arrays.pop if isinstance(arrays, dict) else arrays.__getitem__

    def put(keys: tuple, _) -> jax.Array | tuple[jax.Array, ...]:
        path = path_of(keys)
        x = take(path)
        return _apart(path, x, device) if device.platform == "cpu" and "/blocks/" in path else jax.device_put(x, device)

    return Weights(*(jax.tree_util.tree_map_with_path(put, tree) for tree in definition.shapes()))


def stacked(placed: Placed, definition: Definition) -> Weights:
    """Returns the weights in the shapes of the definition."""

    def get(keys: tuple, like: jax.ShapeDtypeStruct, x: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
        return _together(path_of(keys), x, like.shape) if isinstance(x, tuple) else x

    trees = zip(definition.shapes(), placed, strict=True)
    return Weights(*(jax.tree_util.tree_map_with_path(get, *pair) for pair in trees))


def _dims_in(path: str) -> int:
    return DIMS_IN.get(path.partition("/blocks/")[2], 0)


def _apart(path: str, x: Array, device: jax.Device) -> tuple[jax.Array, ...]:
    """Returns one array a block, a kernel as a matrix [out, in]."""
    n, parts = _dims_in(path), np.asarray(x)
    if n:
        parts = [part.reshape(math.prod(part.shape[:n]), -1).T for part in parts]
    return tuple(jax.device_put(part, device) for part in parts)


def _together(path: str, parts: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    """Returns the stack; where blocks are run one by one the compiler sees through it, and copies nothing."""
    return jnp.stack([(part.T if _dims_in(path) else part).reshape(shape[1:]) for part in parts])


def in_pieces(encode: Callable[[np.ndarray], jax.Array], inputs: np.ndarray) -> np.ndarray:
    """Returns the rows that `encode` makes of the inputs', called with no batch size but those of `BATCH_SIZES`."""
    outputs, start = [], 0
    for rows, size in pieces(len(inputs)):
        padded = pad(inputs[start : start + rows], size)
        outputs.append(np.asarray(encode(padded))[:rows])
        start += rows
    return np.concatenate(outputs)


def pieces(n: int) -> list[tuple[int, int]]:
    """Returns (rows, batch size) of the calls that n rows are done in; at least three quarters of a call are rows."""
    found = []
    while n or not found:
        size = next((size for size in BATCH_SIZES if 3 * size <= 4 * n <= 4 * size), None)
        size = size or max(size for size in BATCH_SIZES if size <= max(n, 1))
        found.append((min(n, size), size))
        n -= found[-1][0]
    return found


def cut(tokens_BL: Int[np.ndarray, "B L"], longest: int, context_length: int) -> Int[np.ndarray, "B M"]:
    """Returns the tokens of a call up to the first of its lengths that holds the longest caption, padded where needed.

    Behind a causal mask nothing after an EOT is ever seen: the features are the same.
    """
    lengths = [n for n in TEXT_LENGTHS[len(tokens_BL)] if longest <= n < context_length]
    length = min([*lengths, context_length])
    return np.pad(tokens_BL[:, :length], ((0, 0), (0, max(0, length - tokens_BL.shape[1]))))


def pad(rows: np.ndarray, size: int, value: int = 0) -> np.ndarray:
    """Returns the rows, and others of one value behind them up to a size."""
    missing = size - len(rows)
    return np.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1)), constant_values=value) if missing else rows


def _bound(definition: Definition, placed: Placed):
    """Returns the model, whose blocks are run one by one where they are kept apart."""
    unroll = any(isinstance(x, tuple) for x in placed.params["text"]["blocks"]["mlp"]["up"].values())
    definition = definition.computed(unroll=unroll)
    return definition.bind(stacked(placed, definition))


@functools.partial(jax.jit, static_argnums=0)
def encode_image(definition: Definition, placed: Placed, image_BHWC: jax.Array) -> Float[jax.Array, "B E"]:
    """Returns image features, not L2-normalised."""
    return _bound(definition, placed).encode_image(image_BHWC)


@functools.partial(jax.jit, static_argnums=0)
def encode_text(definition: Definition, placed: Placed, tokens_BL: jax.Array) -> Float[jax.Array, "B E"]:
    """Returns text features, not L2-normalised."""
    return _bound(definition, placed).encode_text(tokens_BL)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("layer", "post_norm"))
def text_states(
    definition: Definition, placed: Placed, tokens_BL: jax.Array, *, layer: int, post_norm: bool
) -> Float[jax.Array, "B L D"]:
    """Returns the states behind one of the text tower's blocks."""
    text = _bound(definition, placed).text
    states_BLD = text.states(tokens_BL)[layer]
    return text.post_norm(states_BLD) if post_norm else states_BLD


@functools.partial(jax.jit, static_argnums=0)
def logits(definition: Definition, placed: Placed, img_BE: jax.Array, txt_AE: jax.Array) -> Float[jax.Array, "B A"]:
    """Returns the logits per image of features that are not L2-normalised."""
    return _bound(definition, placed).logits(img_BE, txt_AE)[0]
