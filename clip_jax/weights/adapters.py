"""Adapters (LoRA, arXiv 2106.09685) taken into the kernels that they stand beside: what is then left is a plain model.

A path such as "image/blocks/mlp/up/kernel" has its adapters at ".../lora_a" and ".../lora_b". All are stacks, a block
at each place of the first dimension. Block by block, in float64, so that a result is rounded once.
"""

import math
from collections.abc import Mapping

import numpy as np

from clip_jax.architecture import Lora
from clip_jax.optim.parameters import is_adapter


def merged(arrays: Mapping[str, np.ndarray], lora: Lora) -> dict[str, np.ndarray]:
    """Returns the arrays without adapters: kernels that had some are W + scale · A·B, in the dtype of W."""
    plain = {}
    for path, x in arrays.items():
        module, _, name = path.rpartition("/")
        if name == "kernel" and f"{module}/lora_a" in arrays:
            x = _merged(x, arrays[f"{module}/lora_a"], arrays[f"{module}/lora_b"], lora.scale)
        if not is_adapter(path):
            plain[path] = x
    return plain


def _merged(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Returns a stack of kernels [in…, apart…, out…] with what [in…, apart…, R] and [apart…, R, out…] add to each."""
    apart = a.ndim + b.ndim - kernel.ndim - 3  # dimensions that have adapters of their own
    each, rank = math.prod(b.shape[1 : 1 + apart]), a.shape[-1]
    result = np.empty_like(kernel)
    for i, w in enumerate(kernel):
        into, out = np.float64(a[i]).reshape(-1, each, rank), np.float64(b[i]).reshape(each, rank, -1)
        more = np.einsum("itr,tro->ito", into, out, optimize=True).reshape(w.shape)
        result[i] = np.float64(w) + scale * more
    return result
