"""The architectures by name: what a parameter means, apart from how and where it is computed.

An `Architecture` travels with every checkpoint and export, so that weights never meet the wrong patch size or
pixel normalisation. It is plain data: this file imports no jax.
"""

import dataclasses

from clip_jax.config import ModelConfig
from clip_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """A Vision Transformer (arXiv 2010.11929) with CLIP's extra layer norm before the first block."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int

    def __post_init__(self):
        if self.image_size % self.patch_size or self.image_size <= 0:
            below = max(self.image_size // self.patch_size, 1) * self.patch_size
            raise UserError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
                f"the nearest that fit are {below} and {below + self.patch_size}"
            )
        _check_heads("image", self.width, self.num_heads)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A causal Transformer (GPT-2's, as in the CLIP paper), pooled at the EOT."""

    context_length: int
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int

    def __post_init__(self):
        if self.context_length < 3:
            raise UserError(f"context_length={self.context_length} has no room for a word, SOT and EOT; at least 3")
        _check_heads("text", self.width, self.num_heads)


def _check_heads(tower: str, width: int, num_heads: int) -> None:
    if width % num_heads:
        raise UserError(f"the {tower} tower's width={width} is not a multiple of num_heads={num_heads}")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the tower's input; the defaults are OpenAI's."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], RGB
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Two towers, the space where they meet, and how their inputs are made."""

    embed_dim: int
    image: ImageTower
    text: TextTower
    preprocess: Preprocess = Preprocess()


def _vit(embed_dim: int, image: tuple, text: tuple, context_length: int = 77) -> Architecture:
    """Returns an architecture from (size, patch, width, depth, heads) and (width, depth, heads)."""
    size, patch, width, depth, heads = image
    text_width, text_depth, text_heads = text
    return Architecture(
        embed_dim,
        ImageTower(size, patch, width, depth, heads, 4 * width),
        TextTower(context_length, 49408, text_width, text_depth, text_heads, 4 * text_width),
    )


VARIANTS = {
    # OpenAI's Vision Transformers: arXiv 2103.00020, table 20.
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
