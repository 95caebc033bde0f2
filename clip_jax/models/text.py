"""The text tower: a Transformer whose state at one position of a caption is the caption's embedding."""

import jax
from flax import nnx

from clip_jax.architecture import TextTower
from clip_jax.models import transformer
from clip_jax.models.layers import Array, LayerNorm, normal, project, zeros
from clip_jax.models.transformer import Compute
from clip_jax.typing import Float, Int

# Which position stands for a caption, by the architecture's word; NumPy in, NumPy out.
POOLS = {
    "argmax": lambda tokens_BL, eos_id: tokens_BL.argmax(-1),  # OpenAI's EOT has the largest id: the first of them
    "eos": lambda tokens_BL, eos_id: (tokens_BL == eos_id).argmax(-1),
    "last": lambda tokens_BL, eos_id: (tokens_BL[:, 0] * 0) + (tokens_BL.shape[1] - 1),
}


def pooled_at(tower: TextTower, tokens_BL: Int[Array, "B L"]) -> Int[Array, " B"]:
    """Returns the position of each caption whose state is its embedding."""
    return POOLS[tower.pool](tokens_BL, tower.eos_id)


class TextTransformer(nnx.Module):
    """Token and position embeddings through the blocks; the state of one position, projected, is the embedding."""

    def __init__(self, tower: TextTower, embed_dim: int, compute: Compute, *, key: jax.Array):
        width = tower.width
        tokens, positions, blocks, projection = jax.random.split(key, 4)
        self.token_embedding = normal(tokens, (tower.vocab_size, width), 0.02)
        self.positional_embedding = normal(positions, (tower.context_length, width), 0.01)
        self.blocks = transformer.stack(transformer.text_block, blocks, tower, compute)
        self.post_norm = LayerNorm(width, eps=tower.eps)
        self.projection = normal(projection, (width, embed_dim), width**-0.5) if tower.projection else None
        self.projection_bias = zeros((embed_dim,)) if tower.projection_bias else None
        self.tower = tower
        self.compute = compute

    def __call__(self, tokens_BL: Int[jax.Array, "B L"]) -> Float[jax.Array, "B E"]:
        """Returns embeddings, not normalised.

        Behind a causal mask nothing after the pooled position can be seen: a batch may then be cut to its longest
        caption, and the result is the same.
        """
        at_B = pooled_at(self.tower, tokens_BL)
        pieces = (self._embed(tokens_BL),)
        (x_B1D,) = transformer.run(self.blocks, pieces, self.compute, at_B, fixed=self.compute.fixed_text)
        return project(self.post_norm(x_B1D[:, 0]), self.projection, self.projection_bias)

    def states(self, tokens_BL: Int[jax.Array, "B L"]) -> Float[jax.Array, "depth B L D"]:
        """Returns what comes out of every block, before the last layer norm."""
        return transformer.states(self.blocks, self._embed(tokens_BL))

    def _embed(self, tokens_BL: Int[jax.Array, "B L"]) -> Float[jax.Array, "B L D"]:
        table_VD = transformer.everywhere(self.token_embedding[...], self.compute)
        x_BLD = table_VD[tokens_BL].astype(self.compute.dtype)  # so that gradients add up in float32
        x_BLD = transformer.stay(x_BLD, self.compute)
        return x_BLD + self.positional_embedding[...].astype(self.compute.dtype)[: tokens_BL.shape[1]]
