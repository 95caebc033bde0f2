"""The architectures by name: what a parameter means, apart from how and where it is computed.

An `Architecture` travels with every checkpoint and export, so that weights never meet the wrong patch size or
pixel normalisation. It is plain data: this file imports no jax.
"""

import dataclasses
import math
from typing import ClassVar

from clip_jax.config import ModelConfig
from clip_jax.errors import UserError, nearest

ACTIVATIONS = ("quick_gelu", "gelu")  # between the two products of an MLP; clip_jax/models/layers.py has them

# Far beyond any model; a larger number in a file is a mistake, and building it would take for ever.
LARGEST_SIZE = 2**20
LARGEST_DEPTH = 256  # blocks a tower, or bottlenecks a stage


@dataclasses.dataclass(frozen=True)
class ViTTower:
    """A Vision Transformer (arXiv 2010.11929) with CLIP's extra layer norm before the first block."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    activation: str = "quick_gelu"
    kind: str = "vit"

    def __post_init__(self):
        _check_depth("image", self.depth)
        _check_sizes("the image tower's ", patch_size=self.patch_size, width=self.width, mlp_dim=self.mlp_dim)
        _check_multiple(self.image_size, self.patch_size, f"patch_size={self.patch_size}")
        _check_sizes("the image tower's ", image_size=self.image_size, num_patches=self.num_patches)
        _check_heads("image", self.width, self.num_heads)
        _check_activation("image", self.activation)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class ResNetTower:
    """A ResNet (arXiv 1512.03385) as CLIP modifies it, pooled by attention."""

    STRIDE: ClassVar[int] = 32  # pixels between two positions of the last stage

    image_size: int
    width: int  # of the stem; the last stage is 32 times as wide
    depths: tuple[int, int, int, int]  # bottlenecks a stage
    num_heads: int  # of the attention pool
    kind: str = "resnet"

    def __post_init__(self):
        _check_multiple(self.image_size, self.STRIDE, f"{self.STRIDE}, the stride of a ResNet")
        _check_sizes("the image tower's ", image_size=self.image_size, width=self.width, num_patches=self.num_patches)
        if self.width % 2:
            raise UserError(f"the image tower's width={self.width} is odd; the stem of a ResNet begins with half of it")
        if not all(1 <= depth <= LARGEST_DEPTH for depth in self.depths):
            raise UserError(f"depths={self.depths}: every stage of a ResNet has 1 to {LARGEST_DEPTH} bottlenecks")
        _check_heads("image", 32 * self.width, self.num_heads)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.STRIDE) ** 2


ImageTower = ViTTower | ResNetTower  # in a file, the word `kind` tells which


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A causal Transformer (GPT-2's, as in the CLIP paper), pooled at the EOT."""

    context_length: int
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    activation: str = "quick_gelu"

    def __post_init__(self):
        if self.context_length < 3:
            raise UserError(f"context_length={self.context_length} has no room for a word, SOT and EOT; at least 3")
        _check_depth("text", self.depth)
        sizes = {"context_length": self.context_length, "vocab_size": self.vocab_size}
        _check_sizes("the text tower's ", **sizes, width=self.width, mlp_dim=self.mlp_dim)
        _check_heads("text", self.width, self.num_heads)
        _check_activation("text", self.activation)


def _check_sizes(whose: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not 1 <= size <= LARGEST_SIZE:
            raise UserError(f"{whose}{name}={size} should be 1 to {LARGEST_SIZE}")


def _check_depth(tower: str, depth: int) -> None:
    if not 1 <= depth <= LARGEST_DEPTH:
        raise UserError(f"the {tower} tower's depth={depth} should be 1 to {LARGEST_DEPTH}")


def _check_multiple(image_size: int, step: int, what: str) -> None:
    if image_size % step or image_size <= 0:
        below = max(image_size // step, 1) * step
        raise UserError(
            f"image_size={image_size} is not a multiple of {what}; the nearest that fit are {below} and {below + step}"
        )


def _check_activation(tower: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise UserError(f"the {tower} tower's activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")


def _check_heads(tower: str, width: int, num_heads: int) -> None:
    if num_heads < 1 or width % num_heads:
        raise UserError(f"the {tower} tower's width={width} is not a multiple of num_heads={num_heads}")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the tower's input; the defaults are OpenAI's."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], RGB
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if not all(math.isfinite(x) for x in self.mean):
            raise UserError(f"preprocess.mean={self.mean} should be finite numbers")
        if not all(math.isfinite(x) and x > 0 for x in self.std):
            raise UserError(f"preprocess.std={self.std} should be finite and positive numbers")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Two towers, the space where they meet, and how their inputs are made."""

    embed_dim: int
    image: ImageTower
    text: TextTower
    preprocess: Preprocess = Preprocess()

    def __post_init__(self):
        _check_sizes("", embed_dim=self.embed_dim)


def _vit(embed_dim: int, image: tuple, text: tuple, context_length: int = 77) -> Architecture:
    """Returns an architecture from (size, patch, width, depth, heads) and (width, depth, heads)."""
    size, patch, width, depth, heads = image
    text_width, text_depth, text_heads = text
    return Architecture(
        embed_dim,
        ViTTower(size, patch, width, depth, heads, 4 * width),
        TextTower(context_length, 49408, text_width, text_depth, text_heads, 4 * text_width),
    )


def _resnet(embed_dim: int, image: tuple, text_width: int) -> Architecture:
    """Returns one of OpenAI's from (size, width, depths) and the text tower's width; all heads are 64 wide."""
    size, width, depths = image
    return Architecture(
        embed_dim,
        ResNetTower(size, width, depths, 32 * width // 64),
        TextTower(77, 49408, text_width, 12, text_width // 64, 4 * text_width),
    )


VARIANTS = {
    # OpenAI's: arXiv 2103.00020, tables 19 and 20, in the order of its `available_models()`.
    "RN50": _resnet(1024, (224, 64, (3, 4, 6, 3)), 512),
    "RN101": _resnet(512, (224, 64, (3, 4, 23, 3)), 512),
    "RN50x4": _resnet(640, (288, 80, (4, 6, 10, 6)), 640),
    "RN50x16": _resnet(768, (384, 96, (6, 8, 18, 8)), 768),
    "RN50x64": _resnet(1024, (448, 128, (3, 15, 36, 10)), 1024),
    "ViT-B/32": _vit(512, (224, 32, 768, 12, 12), (512, 12, 8)),
    "ViT-B/16": _vit(512, (224, 16, 768, 12, 12), (512, 12, 8)),
    "ViT-L/14": _vit(768, (224, 14, 1024, 24, 16), (768, 12, 12)),
    "ViT-L/14@336px": _vit(768, (336, 14, 1024, 24, 16), (768, 12, 12)),
    # Ours, for two CPU cores: W64 is the width of both towers.
    "ViT-W64/4@16px": _vit(64, (16, 4, 64, 3, 4), (64, 2, 4), context_length=16),
    "ViT-W96/8@40px": _vit(96, (40, 8, 96, 3, 4), (64, 2, 4), context_length=20),
}


def architecture(model: ModelConfig) -> Architecture:
    """Returns the named architecture with the config's changes.

    Raises:
        UserError: no such name, or an image size that the patch does not divide.
    """
    if model.variant not in VARIANTS:
        raise UserError(f"unknown model variant {model.variant!r}{nearest(model.variant, VARIANTS)}")
    named = VARIANTS[model.variant]
    image, text = named.image, named.text
    if model.image_size is not None:
        image = dataclasses.replace(image, image_size=model.image_size)
    if model.context_length is not None:
        text = dataclasses.replace(text, context_length=model.context_length)
    return dataclasses.replace(named, image=image, text=text)
