"""The image tower: a Vision Transformer (arXiv 2010.11929) as OpenAI's CLIP has it."""

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.models import transformer
from clip_jax.models.layers import LayerNorm, normal, uniform
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import ViTTower
from clip_jax.typing import Float


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its size: every patch is projected by itself, which is one matrix product."""

    def __init__(self, patch_size: int, width: int, *, key: jax.Array):
        fan_in = 3 * patch_size**2
        self.kernel = uniform(key, (patch_size, patch_size, 3, width), fan_in**-0.5)

    def __call__(self, x_BHWC: Float[jax.Array, "B H W C"]) -> Float[jax.Array, "B P D"]:
        batch, height, width, channels = x_BHWC.shape
        side, _, _, out = self.kernel.shape
        patches = x_BHWC.reshape(batch, height // side, side, width // side, side, channels)
        patches = patches.swapaxes(2, 3).reshape(batch, -1, side * side * channels)
        return patches @ self.kernel[...].astype(x_BHWC.dtype).reshape(-1, out)


class ViT(nnx.Module):
    """Patches and a class token through the blocks; the class token, projected, is the embedding."""

    def __init__(self, tower: ViTTower, embed_dim: int, compute: Compute, *, key: jax.Array):
        width = tower.width
        patches, cls, positions, blocks, projection = jax.random.split(key, 5)
        self.patch_embed = PatchEmbed(tower.patch_size, width, key=patches)
        self.class_embedding = normal(cls, (width,), width**-0.5)
        self.positional_embedding = normal(positions, (tower.num_patches + 1, width), width**-0.5)
        self.pre_norm = LayerNorm(width)
        self.blocks = transformer.stack(lambda k: transformer.image_block(k, tower), blocks, tower.depth)
        self.post_norm = LayerNorm(width)
        self.projection = normal(projection, (width, embed_dim), width**-0.5)
        self.compute = compute

    def __call__(self, image_BHWC: Float[jax.Array, "B H W C"], *, train: bool = False) -> Float[jax.Array, "B E"]:
        """Returns embeddings, not normalised, of images that are (mean and deviation of `Preprocess`).

        Nothing here is done differently when training; a `ResNet` does.
        """
        x_BLD, class_token_B = self._embed(image_BHWC), jnp.zeros(len(image_BHWC), jnp.int32)
        x_BD = transformer.run(self.blocks, x_BLD, class_token_B, self.compute)
        return self.post_norm(x_BD) @ self.projection[...].astype(self.compute.dtype)

    def states(self, image_BHWC: Float[jax.Array, "B H W C"]) -> list[Float[jax.Array, "B L D"]]:
        """Returns what comes out of every block."""
        return list(transformer.states(self.blocks, self._embed(image_BHWC)))

    def _embed(self, image_BHWC: Float[jax.Array, "B H W C"]) -> Float[jax.Array, "B L D"]:
        x_BPD = self.patch_embed(image_BHWC.astype(self.compute.dtype))
        cls_B1D = jnp.broadcast_to(
            self.class_embedding[...].astype(self.compute.dtype), (len(x_BPD), 1, x_BPD.shape[-1])
        )
        x_BLD = jnp.concatenate([cls_B1D, x_BPD], axis=1) + self.positional_embedding[...].astype(self.compute.dtype)
        return self.pre_norm(x_BLD)
