"""The contrastive loss: normalised embeddings of the global batch in, one number out. Knows no model and no mesh.

Computed in float32, or wider when the embeddings are.
"""

import jax
import jax.numpy as jnp

from clip_jax.typing import Bool, Float

# Stands for "not there" among logits: far below every scaled cosine, and finite, so that a row without a single valid
# partner has a finite value (which is then not counted) and a gradient of zero instead of NaN.
ABSENT = -1e30


def softmax(
    img_BE: Float[jax.Array, "B E"],
    txt_BE: Float[jax.Array, "B E"],
    *,
    scale: Float[jax.Array, ""],
    valid_B: Bool[jax.Array, " B"],
) -> Float[jax.Array, ""]:
    """Returns the symmetric InfoNCE loss, averaged over valid pairs (CLIP, arXiv 2103.00020, figure 3).

    A pair that is not valid is neither a positive nor anybody's negative: the result is that of the batch without it.
    Without any valid pair it is 0.

    A row costs log Σⱼ exp lᵢⱼ − lᵢᵢ, written as softplus(log Σ_{j≠i} exp(lᵢⱼ − lᵢᵢ)): the same number, without the
    difference of two large ones that would be all rounding once a model has learnt its pairs.
    """
    dtype = jnp.promote_types(jnp.result_type(img_BE, txt_BE), jnp.float32)
    img_BE = jnp.where(valid_B[:, None], img_BE, 0).astype(dtype)  # what is not valid may be NaN
    txt_BE = jnp.where(valid_B[:, None], txt_BE, 0).astype(dtype)
    logits_BB = scale * jnp.matmul(img_BE, txt_BE.T, precision=jax.lax.Precision.HIGHEST)
    positive_B = jnp.diagonal(logits_BB)
    negative_BB = valid_B[:, None] & valid_B & ~jnp.eye(len(valid_B), dtype=bool)

    def cost(margin_BB: jax.Array, axis: int) -> jax.Array:
        return jax.nn.softplus(jax.nn.logsumexp(jnp.where(negative_BB, margin_BB, ABSENT), axis=axis))

    image_to_text_B = cost(logits_BB - positive_B[:, None], axis=1)
    text_to_image_B = cost(logits_BB - positive_B, axis=0)
    pair_B = jnp.where(valid_B, (image_to_text_B + text_to_image_B) / 2, 0)
    return pair_B.sum() / jnp.maximum(valid_B.sum(), 1)
