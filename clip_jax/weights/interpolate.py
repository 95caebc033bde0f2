"""Weights on the line between two models: WiSE-FT (arXiv 2109.01903), which keeps a fine-tuned model robust.

θ = (1 - α) · θ_zero-shot + α · θ_fine-tuned, of every array: of the temperature as it is stored, a logarithm, and of
batch norm's means and variances too, though not of the count of batches, which is the fine-tuned model's.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import UserError
from clip_jax.weights.bundle import Bundle, differences
from clip_jax.weights.streaming import PIECE, Lazy, specs_of

# How images are resized is often the habit of the project whose format it is, and nothing that weights depend on.
HABITS = tuple(f"preprocess.{name}" for name in ("resize", "interpolation", "fill", "rgb_first", "crop_floor"))


def interpolate(zero_shot: Bundle, fine_tuned: Bundle, alpha: float) -> Bundle:
    """Returns the model that lies `alpha` of the way from one to the other; at 0 and 1 their own numbers.

    Floats are computed in float64 and come in a dtype that holds both models'; how images are resized is the fine-tuned
    model's. Arrays are made when they are asked for.

    Raises:
        UserError: an `alpha` outside [0, 1], or models of two architectures; all that differs.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha={alpha} should be in [0, 1]: 0 is all zero-shot, 1 all fine-tuned")
    problems = differences(zero_shot.architecture, fine_tuned.architecture, besides=HABITS)
    if None not in (zero_shot.tokenizer, fine_tuned.tokenizer) and zero_shot.tokenizer != fine_tuned.tokenizer:
        problems.append("their tokenizer.json are not the same")
    if problems:
        raise UserError(
            f"there is nothing between {zero_shot.origin} and {fine_tuned.origin}, the second of which differs: "
            f"{'; '.join(problems)}"
        )
    first, second = specs_of(zero_shot.arrays), specs_of(fine_tuned.arrays)
    specs = {
        path: jax.ShapeDtypeStruct(like.shape, jnp.promote_types(like.dtype, second[path].dtype))
        for path, like in first.items()
    }

    def make(paths: Sequence[str]) -> Iterator[np.ndarray]:
        for path in paths:
            yield _between(zero_shot.arrays[path], fine_tuned.arrays[path], alpha, specs[path].dtype)

    return dataclasses.replace(
        fine_tuned,
        arrays=Lazy(specs, [([path], make) for path in specs]),
        origin=f"{1 - alpha:g} · {zero_shot.origin} + {alpha:g} · {fine_tuned.origin}",
        tokenizer=fine_tuned.tokenizer or zero_shot.tokenizer,
        results=None,
    )


def _between(zero_shot: np.ndarray, fine_tuned: np.ndarray, alpha: float, dtype: np.dtype) -> np.ndarray:
    """Returns one array of the model between two, computed in pieces."""
    if alpha == 1 or not jnp.issubdtype(dtype, np.floating):
        return fine_tuned.astype(dtype, copy=False)
    if alpha == 0:
        return zero_shot.astype(dtype, copy=False)
    result = np.empty(zero_shot.shape, dtype)
    first, second, rows = map(np.atleast_1d, (zero_shot, fine_tuned, result))
    step = max(1, PIECE // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        rows[piece] = (1 - alpha) * first[piece].astype(np.float64) + alpha * second[piece].astype(np.float64)
    return result
