"""The text tower: a causal Transformer whose state at the EOT is the caption's embedding."""

import jax
from flax import nnx

from clip_jax.models import transformer
from clip_jax.models.layers import LayerNorm, normal
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import TextTower
from clip_jax.typing import Float, Int


class TextTransformer(nnx.Module):
    """Token and position embeddings through causal blocks; the EOT's state, projected, is the embedding."""

    def __init__(self, tower: TextTower, embed_dim: int, compute: Compute, *, key: jax.Array):
        width = tower.width
        tokens, positions, blocks, projection = jax.random.split(key, 4)
        self.token_embedding = normal(tokens, (tower.vocab_size, width), 0.02)
        self.positional_embedding = normal(positions, (tower.context_length, width), 0.01)
        self.blocks = transformer.stack(lambda k: transformer.text_block(k, tower), blocks, tower.depth)
        self.post_norm = LayerNorm(width)
        self.projection = normal(projection, (width, embed_dim), width**-0.5)
        self.compute = compute

    def __call__(self, tokens_BL: Int[jax.Array, "B L"]) -> Float[jax.Array, "B E"]:
        """Returns embeddings, not normalised.

        The EOT has the largest id, so `argmax` finds the first of them. Behind the causal mask nothing after it can be
        seen: a batch may be cut to its longest caption, and the result is the same.
        """
        x_BLD, eot_B = self._embed(tokens_BL), tokens_BL.argmax(-1)
        x_BD = transformer.run(self.blocks, x_BLD, eot_B, self.compute)
        return self.post_norm(x_BD) @ self.projection[...].astype(self.compute.dtype)

    def states(self, tokens_BL: Int[jax.Array, "B L"]) -> Float[jax.Array, "depth B L D"]:
        """Returns what comes out of every block, before the last layer norm."""
        return transformer.states(self.blocks, self._embed(tokens_BL))

    def _embed(self, tokens_BL: Int[jax.Array, "B L"]) -> Float[jax.Array, "B L D"]:
        x_BLD = self.token_embedding[...][tokens_BL].astype(self.compute.dtype)  # so that gradients add up in float32
        return x_BLD + self.positional_embedding[...].astype(self.compute.dtype)[: tokens_BL.shape[1]]
