"""The parts of a Transformer block: layer norm, attention, MLP. Parameters are float32; products run in `dtype`.

Modules are plain NNX pytrees. Their attribute names are the parameter paths of every checkpoint, so they last for ever.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from clip_jax.architecture import Lora
from clip_jax.models.attention import KEPT, attend, attend_by_cudnn
from clip_jax.typing import Float, Int

Array = jax.Array | np.ndarray


def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Returns a float32 parameter drawn from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32))


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> nnx.Param:
    """Returns a float32 parameter drawn from U(-bound, bound)."""
    return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))


def zeros(shape: tuple[int, ...]) -> nnx.Param:
    """Returns a float32 parameter of zeros."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def quick_gelu(x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """Returns x·σ(1.702x), the GELU approximation that OpenAI's weights were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class LayerNorm(nnx.Module):
    """Normalises the last dimension, in float32 or wider whatever comes in (arXiv 1607.06450)."""

    def __init__(self, width: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = zeros((width,))
        self.eps = eps

    def __call__(self, x: Float[jax.Array, "... D"]) -> Float[jax.Array, "... D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - checkpoint_name(wide.mean(-1, keepdims=True), KEPT)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normalised = centred * checkpoint_name(jax.lax.rsqrt(variance + self.eps), KEPT)
        return (normalised * self.scale[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
    """A kernel and a bias. The last dimensions of what comes in meet the first of the kernel, the others are the
    bias's and become the last of the result: heads need no reshaping, and can be split over devices.

    With an adapter the kernel stands for itself and A·B · scale, of which x meets A and B one after the other."""

    def __init__(
        self,
        kernel: nnx.Param,
        bias: nnx.Param,
        *,
        lora_a: nnx.Param | None = None,
        lora_b: nnx.Param | None = None,
        lora_scale: float = 1.0,
    ):
        self.kernel = kernel
        self.bias = bias
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.lora_scale = lora_scale

    def __call__(self, x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        dims_in = kernel.ndim - bias.ndim
        y = jnp.tensordot(x, kernel, axes=dims_in) + bias
        if self.lora_a is None:
            return y
        low = jnp.tensordot(x, self.lora_a[...].astype(x.dtype), axes=dims_in) * self.lora_scale
        return y + jnp.tensordot(low, self.lora_b[...].astype(x.dtype), axes=1)


def adapted(linear: Linear, lora: Lora, key: jax.Array, *, apart: int = 0) -> Linear:
    """Returns the linear with an adapter (LoRA, arXiv 2106.09685) that changes nothing yet: A is drawn, B is zero.

    The first `apart` dimensions of the result have an adapter for each place in them.
    """
    shape, dims_in = linear.kernel.shape, linear.kernel.ndim - linear.bias.ndim
    into, each, out = shape[:dims_in], shape[dims_in : dims_in + apart], shape[dims_in + apart :]
    return Linear(
        linear.kernel,
        linear.bias,
        lora_a=uniform(key, (*into, *each, lora.rank), math.prod(into) ** -0.5),  # as PyTorch draws a linear
        lora_b=zeros((*each, lora.rank, *out)),
        lora_scale=lora.scale,
    )


def project(
    x_BD: Float[jax.Array, "B D"], kernel: nnx.Param | None, bias: nnx.Param | None = None
) -> Float[jax.Array, "B E"]:
    """Returns x in the joint space, which without a kernel is the tower's own."""
    if kernel is None:
        return x_BD
    x_BE = x_BD @ kernel[...].astype(x_BD.dtype)
    return x_BE if bias is None else x_BE + bias[...].astype(x_BD.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention, causal or not, of a sequence that may come in pieces (T: queries, keys and values)."""

    def __init__(self, *, qkv: Linear, out: Linear, causal: bool, implementation: str = "xla"):
        self.qkv = qkv  # kernel [D, T, N, K]; with adapters [D, T, R] and [T, R, N, K]
        self.out = out  # kernel [N, K, D]
        self.causal = causal
        self.implementation = implementation  # "xla" or "cudnn"

    def __call__(
        self, pieces: tuple[Float[jax.Array, "B _ D"], ...], at_B: Int[jax.Array, " B"] | None = None
    ) -> tuple[Float[jax.Array, "B _ D"], ...]:
        """Returns what all positions, or one of each row, gather from all that they see."""
        assert len(pieces) == 1 or (not self.causal and at_B is None), "whose positions count is whole"
        queries, keys, values = zip(*map(self._heads, pieces), strict=True)
        if self.implementation == "cudnn" and at_B is None and len(pieces) == 1:
            result_BNLK = attend_by_cudnn(queries[0], keys[0], values[0], causal=self.causal)
            return (self.out(result_BNLK.swapaxes(1, 2)),)
        length = pieces[0].shape[1]
        seen_LM = jnp.tri(length, dtype=bool) if self.causal else None
        if at_B is not None:
            queries = (jnp.take_along_axis(queries[0], at_B[:, None, None, None], axis=2),)
            seen_LM = seen_LM if seen_LM is None else seen_LM[at_B][:, None, None]
        return tuple(self.out(x_BNLK.swapaxes(1, 2)) for x_BNLK in attend(queries, keys, values, seen_LM))

    def _heads(self, x_BLD: Float[jax.Array, "B L D"]) -> tuple[Float[jax.Array, "B N L K"], ...]:
        """Returns queries, scaled, and keys and values, heads before positions as attention wants them.

        What comes out of one product is copied apart, and for three products the kernel is: that pays for many rows.
        """
        batch, length, width = x_BLD.shape
        kernel, bias = self.qkv.kernel[...].astype(x_BLD.dtype), self.qkv.bias[...].astype(x_BLD.dtype)
        if batch * length < 4 * width:
            thirds = (jnp.tensordot(x_BLD, kernel, axes=1) + bias).transpose(2, 0, 3, 1, 4)
        else:
            thirds = [jnp.einsum("BLD,DNK->BNLK", x_BLD, kernel[:, t]) + bias[t][:, None] for t in range(3)]
        if self.qkv.lora_a is not None:
            thirds = [x_BNLK + self._adapter(x_BLD, t) for t, x_BNLK in enumerate(thirds)]
        q_BNLK, k_BNLK, v_BNLK = thirds
        return q_BNLK * q_BNLK.shape[-1] ** -0.5, k_BNLK, v_BNLK

    def _adapter(self, x_BLD: Float[jax.Array, "B L D"], t: int) -> Float[jax.Array, "B N L K"]:
        """Returns what an adapter adds to queries, to keys or to values."""
        a_DTR, b_TRNK = self.qkv.lora_a[...].astype(x_BLD.dtype), self.qkv.lora_b[...].astype(x_BLD.dtype)
        low_BLR = (x_BLD @ a_DTR[:, t]) * self.qkv.lora_scale
        return jnp.einsum("BLR,RNK->BNLK", low_BLR, b_TRNK[t])


class MLP(nnx.Module):
    """Two projections with an activation between them."""

    def __init__(self, *, up: Linear, down: Linear, activation: str):
        self.up = up  # kernel [D, F]
        self.down = down  # kernel [F, D]
        self.activation = activation

    def __call__(self, x: Float[jax.Array, "... D"]) -> Float[jax.Array, "... D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))
