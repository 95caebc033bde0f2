"""The image tower: a Vision Transformer (arXiv 2010.11929) as OpenAI's CLIP, CLIPA and SigLIP have it."""

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.architecture import ViTTower
from clip_jax.models import transformer
from clip_jax.models.layers import MLP, LayerNorm, Linear, normal, project, uniform, zeros
from clip_jax.models.transformer import Compute
from clip_jax.typing import Float


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its size: every patch is projected by itself, which is one matrix product."""

    def __init__(self, patch_size: int, width: int, *, bias: bool, key: jax.Array):
        fan_in = 3 * patch_size**2
        self.kernel = uniform(key, (patch_size, patch_size, 3, width), fan_in**-0.5)
        self.bias = zeros((width,)) if bias else None

    def __call__(self, x_BHWC: Float[jax.Array, "B H W C"]) -> Float[jax.Array, "B P D"]:
        batch, height, width, channels = x_BHWC.shape
        side, _, _, out = self.kernel.shape
        rows, columns = height // side, width // side
        x_BHWC = x_BHWC[:, : rows * side, : columns * side]
        patches = x_BHWC.reshape(batch, rows, side, columns, side, channels)
        patches = patches.swapaxes(2, 3).reshape(batch, -1, side * side * channels)
        x_BPD = patches @ self.kernel[...].astype(x_BHWC.dtype).reshape(-1, out)
        return x_BPD if self.bias is None else x_BPD + self.bias[...].astype(x_BHWC.dtype)


class MapPool(nnx.Module):
    """Multihead attention pooling ("MAP", arXiv 2106.04560): a learnt probe asks all patches, then an MLP."""

    def __init__(self, tower: ViTTower, *, key: jax.Array):
        width, heads, mlp_dim = tower.width, (tower.num_heads, tower.width // tower.num_heads), tower.mlp_dim
        probe, qkv, out, up, down = jax.random.split(key, 5)
        xavier = (6 / (width + 3 * width)) ** 0.5
        self.probe = normal(probe, (width,), width**-0.5)
        self.qkv = Linear(uniform(qkv, (width, 3, *heads), xavier), zeros((3, *heads)))
        self.out = Linear(uniform(out, (*heads, width), width**-0.5), zeros((width,)))
        self.norm = LayerNorm(width, eps=tower.eps)
        self.mlp = MLP(
            up=Linear(uniform(up, (width, mlp_dim), width**-0.5), zeros((mlp_dim,))),
            down=Linear(uniform(down, (mlp_dim, width), mlp_dim**-0.5), zeros((width,))),
            activation=tower.activation,
        )

    def __call__(self, x_BPD: Float[jax.Array, "B P D"]) -> Float[jax.Array, "B D"]:
        kernel, bias = self.qkv.kernel[...].astype(x_BPD.dtype), self.qkv.bias[...].astype(x_BPD.dtype)
        q_NK = jnp.tensordot(self.probe[...].astype(x_BPD.dtype), kernel[:, 0], 1) + bias[0]
        k_BPNK, v_BPNK = jnp.unstack(jnp.tensordot(x_BPD, kernel[:, 1:], 1) + bias[1:], axis=2)
        scores_BNP = jnp.einsum("NK,BPNK->BNP", q_NK * q_NK.shape[-1] ** -0.5, k_BPNK)
        weights_BNP = jax.nn.softmax(scores_BNP.astype(jnp.promote_types(scores_BNP.dtype, jnp.float32)))
        x_BD = self.out(jnp.einsum("BNP,BPNK->BNK", weights_BNP.astype(x_BPD.dtype), v_BPNK))
        return x_BD + self.mlp(self.norm(x_BD))


class ViT(nnx.Module):
    """Patches, with a class token or without, through the blocks; pooled and projected they are the embedding."""

    def __init__(self, tower: ViTTower, embed_dim: int, compute: Compute, *, key: jax.Array):
        width, positions = tower.width, tower.num_patches + tower.class_token
        patches, cls, position, blocks, projection = jax.random.split(key, 5)
        self.patch_embed = PatchEmbed(tower.patch_size, width, bias=tower.patch_bias, key=patches)
        self.class_embedding = normal(cls, (width,), width**-0.5) if tower.class_token else None
        self.positional_embedding = normal(position, (positions, width), width**-0.5)
        self.pre_norm = LayerNorm(width, eps=tower.eps) if tower.pre_norm else None
        self.blocks = transformer.stack(transformer.image_block, blocks, tower, compute)
        self.post_norm = LayerNorm(width, eps=tower.eps)
        self.map_pool = MapPool(tower, key=projection) if tower.pool == "map" else None
        self.projection = normal(projection, (width, embed_dim), width**-0.5) if tower.projection else None
        self.tower = tower
        self.compute = compute

    def __call__(
        self, image_BHWC: Float[jax.Array, "B H W C"], *, train: bool = False, dropout_B: jax.Array | None = None
    ) -> Float[jax.Array, "B E"]:
        """Returns embeddings, not normalised, of images that are (mean and deviation of `Preprocess`).

        `train` changes nothing here (it does in a `ResNet`). With `dropout_B`, a random key an image, only some of the
        patches are seen.
        """
        x_BLD = self._embed(image_BHWC)
        if dropout_B is not None and self.compute.patch_dropout:
            kept = self.tower.patches_kept(self.compute.patch_dropout)
            x_BLD = some_patches(x_BLD, dropout_B, kept, first=int(self.tower.class_token))
        return project(POOLS[self.tower.pool](self, x_BLD), self.projection)

    def states(self, image_BHWC: Float[jax.Array, "B H W C"]) -> list[Float[jax.Array, "B L D"]]:
        """Returns what comes out of every block."""
        return list(transformer.states(self.blocks, self._embed(image_BHWC)))

    def _embed(self, image_BHWC: Float[jax.Array, "B H W C"]) -> Float[jax.Array, "B L D"]:
        x_BLD = transformer.stay(self.patch_embed(image_BHWC.astype(self.compute.dtype)), self.compute)
        if self.class_embedding is not None:
            cls_D = self.class_embedding[...].astype(self.compute.dtype)
            cls_B1D = jnp.broadcast_to(cls_D, (len(x_BLD), 1, len(cls_D)))
            x_BLD = jnp.concatenate([cls_B1D, x_BLD], axis=1)
        x_BLD = x_BLD + self.positional_embedding[...].astype(self.compute.dtype)
        return x_BLD if self.pre_norm is None else self.pre_norm(x_BLD)


def some_patches(x_BLD: Float[jax.Array, "B L D"], keys_B: jax.Array, kept: int, *, first: int) -> jax.Array:
    """Returns the states of as many patches of each image, drawn by its key, and of all before the `first` patch.

    FLIP (arXiv 2212.00794): positions have been added, so that patches still know where they are.
    """
    patches = x_BLD.shape[1] - first
    drawn_BP = jax.vmap(lambda key: jax.random.permutation(key, patches)[:kept])(keys_B)
    before_BP = jnp.broadcast_to(jnp.arange(first), (len(x_BLD), first))
    at_BL = jnp.concatenate([before_BP, first + drawn_BP], axis=1)
    return jnp.take_along_axis(x_BLD, at_BL[..., None], axis=1)


def class_state(vit: ViT, x_BLD: Float[jax.Array, "B L D"]) -> Float[jax.Array, "B D"]:
    """Returns the class token's state behind the blocks."""
    if vit.compute.unroll:
        class_token_B = jnp.zeros(len(x_BLD), jnp.int32)
        (cls_B1D,) = transformer.run(vit.blocks, (x_BLD,), vit.compute, class_token_B)
    else:
        cls_B1D, _ = both_states(vit, x_BLD)
    return vit.post_norm(cls_B1D[:, 0])


def mean_state(vit: ViT, x_BLD: Float[jax.Array, "B L D"]) -> Float[jax.Array, "B D"]:
    """Returns the mean of the patches' states."""
    _, x_BPD = both_states(vit, x_BLD)
    return vit.post_norm(x_BPD.mean(1)) if vit.tower.norm_after_pool else vit.post_norm(x_BPD).mean(1)


def attended_state(vit: ViT, x_BLD: Float[jax.Array, "B L D"]) -> Float[jax.Array, "B D"]:
    """Returns what a learnt probe gathers from the patches' states."""
    (x_BLD,) = transformer.run(vit.blocks, (x_BLD,), vit.compute, fixed=vit.compute.fixed_image)
    return vit.map_pool(vit.post_norm(x_BLD))


def both_states(
    vit: ViT, x_BLD: Float[jax.Array, "B L D"]
) -> tuple[Float[jax.Array, "B _ D"], Float[jax.Array, "B P D"]]:
    """Returns the states of the class token [B, 1, D], or of none [B, 0, D], and those of the patches [B, P, D].

    The two go through the blocks apart, for the number of patches suits the hardware and one more does not
    (models/attention.py). Unrolled, for a batch of one on a CPU, they stay together: weights are read once. So they do
    for cuDNN, which knows no pieces.
    """
    first = int(vit.tower.class_token)
    if vit.compute.unroll or vit.compute.attention == "cudnn" or not first:
        (x_BLD,) = transformer.run(vit.blocks, (x_BLD,), vit.compute, fixed=vit.compute.fixed_image)
        return x_BLD[:, :first], x_BLD[:, first:]
    pieces = x_BLD[:, first:], x_BLD[:, :first]
    x_BPD, cls_B1D = transformer.run(vit.blocks, pieces, vit.compute, fixed=vit.compute.fixed_image)
    return cls_B1D, x_BPD


# How states become one, by the architecture's word.
POOLS = {"class": class_state, "mean": mean_state, "map": attended_state}
