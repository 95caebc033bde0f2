"""Weights for images and texts of another size: position embeddings resized as the family of the weights does it.

OpenCLIP and timm resize them as PIL does an image (bicubic, and blurred when there are to be fewer), Hugging Face takes
samples between them (a sharper bicubic, never blurred). Nobody but OpenCLIP changes a text's length: linearly, by
samples. To resize is to multiply by a matrix that has, for each new position, the weights of the old ones; a grid's
rows and columns have the same. All in float64, so that a result is rounded once, to the dtype of its array.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from clip_jax.architecture import ImageTower, ResNetTower
from clip_jax.models.variants import resized
from clip_jax.typing import Float
from clip_jax.weights.bundle import Bundle, variant_of

# How deep a bicubic kernel dips below zero. PyTorch has two: with antialias PIL's, without it a deeper one.
DIP_ANTIALIAS, DIP_SAMPLES = -0.5, -0.75
TEXT_POSITIONS = "text/positional_embedding"


def resize(bundle: Bundle, image_size: int | None = None, context_length: int | None = None) -> Bundle:
    """Returns the model for images and captions of another size; None: as it is. Arrays that stay are shared.

    Raises:
        UserError: sizes that do not fit the towers, all of them.
    """
    old, new = bundle.architecture, resized(bundle.architecture, image_size, context_length)
    arrays: dict[str, np.ndarray] = {}
    if new.image.num_patches != old.image.num_patches:
        path = image_positions(old.image)
        matrix = KERNELS[bundle.resize_kernel](*(math.isqrt(tower.num_patches) for tower in (old.image, new.image)))
        arrays[path] = _resize_grid(bundle.arrays[path], matrix)
    if new.text.context_length != old.text.context_length:
        positions_LD = bundle.arrays[TEXT_POSITIONS]
        matrix = linear(old.text.context_length, new.text.context_length)
        arrays[TEXT_POSITIONS] = (matrix @ positions_LD.astype(np.float64)).astype(positions_LD.dtype)
    return dataclasses.replace(
        bundle, architecture=new, arrays=bundle.arrays | arrays, variant=variant_of(new, bundle.variant)
    )


def image_positions(tower: ImageTower) -> str:
    """Returns the path of an image tower's position embeddings."""
    return f"image/{'attention_pool/' if isinstance(tower, ResNetTower) else ''}positional_embedding"


def bicubic_antialias(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the weights of PyTorch's `interpolate(mode="bicubic", antialias=True)`, and of PIL."""
    reach = max(old / new, 1)
    weights = _cubic((_centres(old, new)[:, None] - np.arange(old)) / reach, DIP_ANTIALIAS)
    return weights / weights.sum(axis=1, keepdims=True)


def bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the weights of PyTorch's `interpolate(mode="bicubic")`: beyond an edge it sees the edge."""
    centres = _centres(old, new)
    weights = np.zeros((new, old))
    for step in (-1, 0, 1, 2):
        at = np.floor(centres) + step
        column = np.clip(at, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), column), _cubic(centres - at, DIP_SAMPLES))
    return weights


def linear(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the weights of PyTorch's `interpolate(mode="linear")`."""
    centres = np.clip(_centres(old, new), 0, old - 1)
    return np.maximum(1 - np.abs(centres[:, None] - np.arange(old)), 0)


KERNELS: dict[str, Callable[[int, int], np.ndarray]] = {"bicubic_antialias": bicubic_antialias, "bicubic": bicubic}


def _centres(old: int, new: int) -> Float[np.ndarray, " new"]:
    """Returns where the new positions lie among the old ones: both fill the same image, edge to edge."""
    return (np.arange(new) + 0.5) * old / new - 0.5


def _cubic(distance: Float[np.ndarray, "..."], dip: float) -> Float[np.ndarray, "..."]:
    """Returns the weight of a sample at a distance in [-2, 2] (Keys, "Cubic convolution interpolation", 1981)."""
    x = np.abs(distance)
    near = (dip + 2) * x**3 - (dip + 3) * x**2 + 1
    far = dip * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _resize_grid(
    positions_PD: Float[np.ndarray, "P D"], matrix: Float[np.ndarray, "new old"]
) -> Float[np.ndarray, "_ D"]:
    """Returns the positions of another grid; the one before the grid, the class token's, stays."""
    new, old = matrix.shape
    before = len(positions_PD) - old**2
    grid_HWD = positions_PD[before:].astype(np.float64).reshape(old, old, -1)
    grid_HWD = np.einsum("hH,wW,HWD->hwD", matrix, matrix, grid_HWD, optimize=True)
    return np.concatenate([positions_PD[:before], grid_HWD.reshape(new**2, -1).astype(positions_PD.dtype)])
