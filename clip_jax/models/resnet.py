"""The image tower of OpenAI's RN models: a ResNet with a stem of three convolutions, average pools where others have
strides, and attention in place of the last pool (CLIP, section 2.4).

Batch norm is the only part of this package with a memory: its running statistics are `nnx.BatchStat`, apart from the
parameters, so that no gradient, moment or weight decay reaches them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.architecture import ResNetTower
from clip_jax.models.layers import Linear, normal, uniform, zeros
from clip_jax.models.transformer import REMAT, Compute
from clip_jax.typing import Float

EXPANSION = 4  # a bottleneck's output is this many times as wide as its middle
EPS = 1e-5
MOMENTUM = 0.1  # the share of a new batch in the running statistics


def convolve(
    x_BHWD: Float[jax.Array, "B H W D"], kernel: Float[jax.Array, "S S D F"], stride: int
) -> Float[jax.Array, "B h w F"]:
    """Returns the convolution with a square kernel, the image filled up with zeros so that it keeps its size."""
    if kernel.shape[0] == 1 and stride == 1:
        return x_BHWD @ kernel[0, 0]
    return _convolve(x_BHWD, kernel) if stride == 1 else _native(x_BHWD, kernel, stride)


def _native(x_BHWD: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    margin = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x_BHWD,
        kernel,
        window_strides=(stride, stride),
        padding=((margin, margin), (margin, margin)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@jax.custom_vjp
def _convolve(x_BHWD: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with stride 1. Its gradients are written out for CPUs, where XLA brings convolutions into the form for
    which it has a fast kernel, but not in the body of a loop, such as a scan over blocks: there those of `_native` take
    twenty times as long."""
    return _native(x_BHWD, kernel, 1)


def _convolve_forward(x_BHWD: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _native(x_BHWD, kernel, 1), (x_BHWD, kernel)


def _convolve_backward(kept: tuple[jax.Array, jax.Array], d_BHWF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BHWD, kernel = kept
    d_x_BHWD = _native(d_BHWF, kernel[::-1, ::-1].swapaxes(2, 3), 1)
    d_kernel = jax.lax.platform_dependent(x_BHWD, d_BHWF, kernel, cpu=_kernel_by_products, default=_kernel_natively)
    return d_x_BHWD, d_kernel


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _kernel_natively(x_BHWD: jax.Array, d_BHWF: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the kernel's gradient as XLA computes it."""
    return jax.vjp(lambda kernel: _native(x_BHWD, kernel, 1), kernel)[1](d_BHWF)[0]


def _kernel_by_products(x_BHWD: jax.Array, d_BHWF: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the kernel's gradient: a product of matrices for each of its pixels."""
    size, (height, width) = kernel.shape[0], x_BHWD.shape[1:3]
    margin = ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0))
    filled = jnp.pad(x_BHWD, margin)
    of_pixels = [
        jnp.einsum("BHWD,BHWF->DF", filled[:, i : i + height, j : j + width], d_BHWF)
        for i in range(size)
        for j in range(size)
    ]
    return jnp.stack(of_pixels).reshape(kernel.shape)


class BatchNorm(nnx.Module):
    """Normalises every channel by the batch when training, else by the running statistics (arXiv 1502.03167).

    Over a batch that is split over devices the statistics are those of the whole. As in PyTorch the running variance
    is unbiased, and the one that normalises is not.
    """

    def __init__(self, width: int, *, scale: float = 1.0):
        self.scale = nnx.Param(jnp.full(width, scale, jnp.float32))
        self.bias = zeros((width,))
        self.mean = nnx.BatchStat(jnp.zeros(width, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(width, jnp.float32))
        self.count = nnx.BatchStat(jnp.int32(0))  # batches seen

    def __call__(self, x_BHWD: Float[jax.Array, "B H W D"], *, train: bool) -> Float[jax.Array, "B H W D"]:
        wide = x_BHWD.astype(jnp.promote_types(x_BHWD.dtype, jnp.float32))
        mean, variance = self._batch_statistics(wide) if train else (self.mean[...], self.variance[...])
        normalised = (wide - mean) * (jax.lax.rsqrt(variance + EPS) * self.scale[...]) + self.bias[...]
        return normalised.astype(x_BHWD.dtype)

    def _batch_statistics(self, x_BHWD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the batch's mean and variance, and moves the running ones towards them."""
        mean = x_BHWD.mean((0, 1, 2))
        variance = jnp.square(x_BHWD - mean).mean((0, 1, 2))
        n = x_BHWD.size // x_BHWD.shape[-1]
        self.mean[...] += (MOMENTUM * (mean - self.mean[...])).astype(self.mean.dtype)
        self.variance[...] += (MOMENTUM * (variance * (n / max(n - 1, 1)) - self.variance[...])).astype(
            self.variance.dtype
        )
        self.count[...] += 1
        return mean, variance


class Conv(nnx.Module):
    """A square convolution without bias, then batch norm."""

    def __init__(self, width_in: int, width: int, size: int, *, stride: int = 1, scale: float = 1.0, key: jax.Array):
        fan_in = width_in * size**2
        self.kernel = uniform(key, (size, size, width_in, width), fan_in**-0.5)
        self.norm = BatchNorm(width, scale=scale)
        self.stride = stride

    def __call__(self, x_BHWD: Float[jax.Array, "B H W D"], *, train: bool) -> Float[jax.Array, "B h w F"]:
        return self.norm(convolve(x_BHWD, self.kernel[...].astype(x_BHWD.dtype), self.stride), train=train)


def average_pool(x_BHWD: Float[jax.Array, "B H W D"], size: int) -> Float[jax.Array, "B h w D"]:
    """Returns the means of squares of `size` pixels; rows and columns that fill no square are left out."""
    if size == 1:
        return x_BHWD
    batch, height, width, channels = x_BHWD.shape
    height, width = height // size, width // size
    squares = x_BHWD[:, : height * size, : width * size].reshape(batch, height, size, width, size, channels)
    return squares.mean((2, 4))


class Bottleneck(nnx.Module):
    """1×1, 3×3, 1×1 convolutions beside a shortcut; both ways pool before their last convolution."""

    def __init__(self, width_in: int, width: int, *, pool: int = 1, key: jax.Array):
        wide = EXPANSION * width
        conv1, conv2, conv3, shortcut = jax.random.split(key, 4)
        self.conv1 = Conv(width_in, width, 1, key=conv1)
        self.conv2 = Conv(width, width, 3, key=conv2)
        self.conv3 = Conv(width, wide, 1, scale=0.0, key=conv3)  # so that a new block passes its input on
        reshapes = pool > 1 or width_in != wide
        self.shortcut = Conv(width_in, wide, 1, key=shortcut) if reshapes else None
        self.pool = pool

    def __call__(self, x_BHWD: Float[jax.Array, "B H W D"], *, train: bool) -> Float[jax.Array, "B h w F"]:
        x = jax.nn.relu(self.conv1(x_BHWD, train=train))
        x = jax.nn.relu(self.conv2(x, train=train))
        x = self.conv3(average_pool(x, self.pool), train=train)
        beside = x_BHWD if self.shortcut is None else self.shortcut(average_pool(x_BHWD, self.pool), train=train)
        return jax.nn.relu(x + beside)


class Stage(nnx.Module):
    """A bottleneck that changes the shape, then `depth - 1` alike, stacked and scanned."""

    def __init__(self, width_in: int, width: int, depth: int, *, pool: int, key: jax.Array):
        first, *rest = jax.random.split(key, depth)
        self.first = Bottleneck(width_in, width, pool=pool, key=first)
        self.rest = jax.vmap(lambda k: Bottleneck(EXPANSION * width, width, key=k))(jnp.stack(rest)) if rest else None

    def __call__(self, x_BHWD: jax.Array, *, train: bool, remat: str) -> Float[jax.Array, "B h w F"]:
        def apply(x, block: Bottleneck):
            x = block(x, train=train)  # changes the statistics of this copy of the block: they are handed back
            return x, nnx.to_pure_dict(nnx.state(block, nnx.BatchStat)) if train else None

        first, rest = apply, apply
        if REMAT[remat] is not None:
            first = jax.checkpoint(apply, policy=REMAT[remat])
            rest = jax.checkpoint(apply, policy=REMAT[remat], prevent_cse=False)  # a scan keeps the two passes apart
        x, statistics = first(x_BHWD, self.first)
        if train:
            nnx.update(self.first, statistics)
        if self.rest is not None:
            x, statistics = jax.lax.scan(rest, x, self.rest)
            if train:
                nnx.update(self.rest, statistics)
        return x

    def states(self, x_BHWD: jax.Array) -> list[Float[jax.Array, "B h w F"]]:
        """Returns what comes out of every bottleneck, by the running statistics."""

        def apply(x, block: Bottleneck):
            x = block(x, train=False)
            return x, x

        x, first = apply(x_BHWD, self.first)
        return [first] if self.rest is None else [first, *jax.lax.scan(apply, x, self.rest)[1]]


class AttentionPool(nnx.Module):
    """Attention whose one query is the mean of all positions; the result is the embedding."""

    def __init__(self, positions: int, width: int, num_heads: int, embed_dim: int, *, key: jax.Array):
        heads, std = (num_heads, width // num_heads), width**-0.5
        position, *keys = jax.random.split(key, 9)

        def projection(shape_in: tuple[int, ...], shape: tuple[int, ...], key: jax.Array, bias: jax.Array) -> Linear:
            return Linear(normal(key, (*shape_in, *shape), std), uniform(bias, shape, std))

        self.positional_embedding = normal(position, (positions + 1, width), std)
        self.query = projection((width,), heads, *keys[0:2])
        self.key = projection((width,), heads, *keys[2:4])
        self.value = projection((width,), heads, *keys[4:6])
        self.out = projection(heads, (embed_dim,), *keys[6:8])

    def __call__(self, x_BHWD: Float[jax.Array, "B H W D"]) -> Float[jax.Array, "B E"]:
        x_BPD = x_BHWD.reshape(len(x_BHWD), -1, x_BHWD.shape[-1])
        x_BMD = jnp.concatenate([x_BPD.mean(1, keepdims=True), x_BPD], axis=1)
        x_BMD = x_BMD + self.positional_embedding[...].astype(x_BMD.dtype)
        q_BNK = self.query(x_BMD[:, 0])
        k_BMNK, v_BMNK = self.key(x_BMD), self.value(x_BMD)
        scores_BNM = jnp.einsum("BNK,BMNK->BNM", q_BNK * q_BNK.shape[-1] ** -0.5, k_BMNK)
        weights_BNM = jax.nn.softmax(scores_BNM.astype(jnp.promote_types(scores_BNM.dtype, jnp.float32)))
        mixed_BNK = jnp.einsum("BNM,BMNK->BNK", weights_BNM.astype(x_BMD.dtype), v_BMNK)
        return self.out(mixed_BNK)


class ResNet(nnx.Module):
    """Stem, four stages, attention pool."""

    def __init__(self, tower: ResNetTower, embed_dim: int, compute: Compute, *, key: jax.Array):
        width, depths = tower.width, tower.depths
        keys = jax.random.split(key, 8)
        self.stem1 = Conv(3, width // 2, 3, stride=2, key=keys[0])
        self.stem2 = Conv(width // 2, width // 2, 3, key=keys[1])
        self.stem3 = Conv(width // 2, width, 3, key=keys[2])
        self.stage1 = Stage(width, width, depths[0], pool=1, key=keys[3])
        self.stage2 = Stage(EXPANSION * width, 2 * width, depths[1], pool=2, key=keys[4])
        self.stage3 = Stage(EXPANSION * 2 * width, 4 * width, depths[2], pool=2, key=keys[5])
        self.stage4 = Stage(EXPANSION * 4 * width, 8 * width, depths[3], pool=2, key=keys[6])
        self.attention_pool = AttentionPool(
            tower.num_patches, EXPANSION * 8 * width, tower.num_heads, embed_dim, key=keys[7]
        )
        self.compute = compute

    def __call__(self, image_BHWC: Float[jax.Array, "B H W C"], *, train: bool = False) -> Float[jax.Array, "B E"]:
        """Returns embeddings, not normalised; `train` goes by the batch's statistics and moves the running ones."""
        x_BHWD = self._stem(image_BHWC, train=train)
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x_BHWD = stage(x_BHWD, train=train, remat=self.compute.remat)
        return self.attention_pool(x_BHWD)

    def states(self, image_BHWC: Float[jax.Array, "B H W C"]) -> list[Float[jax.Array, "B h w F"]]:
        """Returns what comes out of every bottleneck, by the running statistics."""
        states = [self._stem(image_BHWC, train=False)]
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            states += stage.states(states[-1])
        return states[1:]

    def _stem(self, image_BHWC: Float[jax.Array, "B H W C"], *, train: bool) -> Float[jax.Array, "B h w D"]:
        x = image_BHWC.astype(self.compute.dtype)
        for conv in (self.stem1, self.stem2, self.stem3):
            x = jax.nn.relu(conv(x, train=train))
        return average_pool(x, 2)
