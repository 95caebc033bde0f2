"""What the weights of a CLIP mean, apart from how and where they are computed.

An `Architecture` travels with every checkpoint and export, so that weights never meet the wrong activation, patch size,
tokenizer or pixel normalisation. It is plain data: this file imports no jax. The defaults of its fields are OpenAI's,
so that files written before a field was there mean what they meant.
"""

import dataclasses
import math
from typing import ClassVar

from clip_jax.errors import UserError

# The words of the fields; the code that knows what they stand for is named after them.
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")  # between the two products of an MLP: models/layers.py
IMAGE_POOLS = ("class", "mean", "map")  # the class token, the mean of the patches, attention: models/vit.py
TEXT_POOLS = ("argmax", "eos", "last")  # the largest id, the first that is `eos_id`, the last: models/text.py
TEXT_CLEANING = ("none", "whitespace", "lower", "canonicalize")  # tokenizer/cleaning.py
TOKENIZERS = ("clip", "file")  # OpenAI's, which is in this package; one that is in a file beside the weights
RESIZES = ("shortest", "squash", "longest")  # what becomes of an image that is no square: data/transforms.py
INTERPOLATIONS = ("bicubic", "bilinear")

# Far beyond any model; a larger number in a file is a mistake, and building it would take for ever.
LARGEST_SIZE = 2**20
LARGEST_DEPTH = 256  # blocks a tower, or bottlenecks a stage


def _check_sizes(whose: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not 1 <= size <= LARGEST_SIZE:
            raise UserError(f"{whose}{name}={size} should be 1 to {LARGEST_SIZE}")


def _check_words(whose: str, **words: tuple[str, tuple[str, ...]]) -> None:
    for name, (word, known) in words.items():
        if word not in known:
            raise UserError(f"{whose}{name}={word!r} is not one of {', '.join(known)}")


def _check_depth(tower: str, depth: int) -> None:
    if not 1 <= depth <= LARGEST_DEPTH:
        raise UserError(f"the {tower} tower's depth={depth} should be 1 to {LARGEST_DEPTH}")


def _check_eps(tower: str, eps: float) -> None:
    if not 0 < eps < 1:
        raise UserError(f"the {tower} tower's eps={eps} should be between 0 and 1")


def _check_multiple(image_size: int, step: int, what: str) -> None:
    if image_size % step or image_size <= 0:
        below = max(image_size // step, 1) * step
        raise UserError(
            f"image_size={image_size} is not a multiple of {what}; the nearest that fit are {below} and {below + step}"
        )


def _check_heads(tower: str, width: int, num_heads: int) -> None:
    if num_heads < 1 or width % num_heads:
        raise UserError(f"the {tower} tower's width={width} is not a multiple of num_heads={num_heads}")


@dataclasses.dataclass(frozen=True)
class ViTTower:
    """A Vision Transformer (arXiv 2010.11929)."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    activation: str = "quick_gelu"
    eps: float = 1e-5  # of layer norm
    pool: str = "class"
    class_token: bool = True
    pre_norm: bool = True  # CLIP's extra layer norm before the first block
    norm_after_pool: bool = False  # whether the last layer norm sees the mean of the patches, not the patches
    patch_bias: bool = False
    projection: bool = True  # to the joint space; without it that is as wide as the tower
    kind: str = "vit"

    def __post_init__(self):
        _check_depth("image", self.depth)
        _check_sizes("the image tower's ", patch_size=self.patch_size, width=self.width, mlp_dim=self.mlp_dim)
        if self.image_size < self.patch_size:
            self.check_divided()
        _check_sizes("the image tower's ", image_size=self.image_size, num_patches=self.num_patches)
        _check_heads("image", self.width, self.num_heads)
        _check_words("the image tower's ", activation=(self.activation, ACTIVATIONS), pool=(self.pool, IMAGE_POOLS))
        _check_eps("image", self.eps)
        if self.class_token != (self.pool == "class") and self.pool != "mean":
            raise UserError(f"the image tower's pool={self.pool!r} does not go with class_token={self.class_token}")
        if self.norm_after_pool and self.pool != "mean":
            raise UserError(f"the image tower's norm_after_pool goes with pool='mean', not {self.pool!r}")

    @property
    def num_patches(self) -> int:
        """Returns how many patches fit; what is left of the pixels at the right and below is not seen."""
        return (self.image_size // self.patch_size) ** 2

    def patches_kept(self, dropped: float) -> int:
        """Returns how many patches of an image are left when a share of them is dropped; one at least."""
        return max(1, int(self.num_patches * (1 - dropped)))

    def check_divided(self) -> None:
        """Raises UserError where some pixels are not seen; one released model has such a size, nobody else wants it."""
        _check_multiple(self.image_size, self.patch_size, f"patch_size={self.patch_size}")


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
        self.check_divided()
        _check_sizes("the image tower's ", image_size=self.image_size, width=self.width, num_patches=self.num_patches)
        if self.width % 2:
            raise UserError(f"the image tower's width={self.width} is odd; the stem of a ResNet begins with half of it")
        if not all(1 <= depth <= LARGEST_DEPTH for depth in self.depths):
            raise UserError(f"depths={self.depths}: every stage of a ResNet has 1 to {LARGEST_DEPTH} bottlenecks")
        _check_heads("image", 32 * self.width, self.num_heads)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.STRIDE) ** 2

    def check_divided(self) -> None:
        """Raises UserError when the last stage would not see all pixels."""
        _check_multiple(self.image_size, self.STRIDE, f"{self.STRIDE}, the stride of a ResNet")


ImageTower = ViTTower | ResNetTower  # in a file, the word `kind` tells which


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A Transformer over token ids, pooled at one position."""

    context_length: int
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    activation: str = "quick_gelu"
    eps: float = 1e-5  # of layer norm
    causal: bool = True  # whether a position sees only what is before it
    pool: str = "argmax"
    eos_id: int | None = None  # where pool is "eos"
    projection: bool = True  # to the joint space; without it that is as wide as the tower
    projection_bias: bool = False

    def __post_init__(self):
        if self.context_length < 3:
            raise UserError(f"context_length={self.context_length} has no room for a word, SOT and EOT; at least 3")
        _check_depth("text", self.depth)
        sizes = {"context_length": self.context_length, "vocab_size": self.vocab_size}
        _check_sizes("the text tower's ", **sizes, width=self.width, mlp_dim=self.mlp_dim)
        _check_heads("text", self.width, self.num_heads)
        _check_words("the text tower's ", activation=(self.activation, ACTIVATIONS), pool=(self.pool, TEXT_POOLS))
        _check_eps("text", self.eps)
        if (self.eos_id is None) == (self.pool == "eos"):
            raise UserError(f"the text tower's eos_id={self.eos_id} does not go with pool={self.pool!r}")
        if self.eos_id is not None and not 0 <= self.eos_id < self.vocab_size:
            raise UserError(f"the text tower's eos_id={self.eos_id} should be 0 to {self.vocab_size - 1}")
        if self.projection_bias and not self.projection:
            raise UserError("the text tower's projection_bias goes with projection=True")

    @property
    def sees_padding(self) -> bool:
        """Returns whether what stands behind a caption changes its features: then all are of one length."""
        return not self.causal or self.pool == "last"


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the tower's input."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], RGB
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "shortest"
    interpolation: str = "bicubic"
    fill: int = 0  # the grey around an image whose longest side is resized
    rgb_first: bool = False  # whether it is made RGB, on white, before it is resized: PIL resizes other modes otherwise
    crop_floor: bool = False  # whether half a pixel at the crop's edge is rounded down, not to even

    def __post_init__(self):
        if not all(math.isfinite(x) for x in self.mean):
            raise UserError(f"preprocess.mean={self.mean} should be finite numbers")
        if not all(math.isfinite(x) and x > 0 for x in self.std):
            raise UserError(f"preprocess.std={self.std} should be finite and positive numbers")
        words = {"resize": (self.resize, RESIZES), "interpolation": (self.interpolation, INTERPOLATIONS)}
        _check_words("preprocess.", **words)
        if not 0 <= self.fill <= 255:
            raise UserError(f"preprocess.fill={self.fill} should be 0 to 255")


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """How a text becomes token ids."""

    kind: str = "clip"
    clean: str = "lower"  # what is done to a text first
    pad_id: int = 0
    pad_left: bool = False
    blank_id: int | None = None  # an id that is replaced by 0 (CLIPA: BERT's [SEP])
    siglip: bool = False  # whether the file is run as Hugging Face's SiglipTokenizer does: tokenizer/sentencepiece.py

    def __post_init__(self):
        _check_words("tokenize.", kind=(self.kind, TOKENIZERS), clean=(self.clean, TEXT_CLEANING))
        by_file = (self.pad_id, self.pad_left, self.blank_id, self.siglip)
        if self.kind == "clip" and by_file != (0, False, None, False):
            raise UserError("tokenize.kind='clip' pads with 0 on the right, blanks nothing and is not SigLIP's")
        for name, id in (("pad_id", self.pad_id), ("blank_id", self.blank_id)):
            if id is not None and not 0 <= id < LARGEST_SIZE:
                raise UserError(f"tokenize.{name}={id} should be 0 to {LARGEST_SIZE - 1}")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) beside the kernels of all blocks: W stands for W + alpha/rank · A·B."""

    rank: int
    alpha: float

    def __post_init__(self):
        if not 1 <= self.rank <= LARGEST_SIZE:
            raise UserError(f"lora: rank={self.rank} should be 1 to {LARGEST_SIZE}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"lora: alpha={self.alpha} should be positive and finite")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, architecture: "Architecture") -> None:
        """Raises UserError when a model has no blocks that take adapters, or none that are wider than their rank."""
        if not isinstance(architecture.image, ViTTower):
            raise UserError(f"adapters of rank {self.rank} go into Transformer blocks, and a ResNet has none")
        widths = {"image": architecture.image.width, "text": architecture.text.width}
        if narrow := [f"the {tower} tower is {width} wide" for tower, width in widths.items() if width <= self.rank]:
            raise UserError(f"adapters of rank {self.rank} are not of low rank: {', '.join(narrow)}")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Two towers, the space where they meet, and how their inputs are made."""

    embed_dim: int
    image: ImageTower
    text: TextTower
    preprocess: Preprocess = Preprocess()
    tokenize: Tokenize = Tokenize()
    logit_bias: bool = False  # SigLIP's: logits are scaled cosines and a bias

    def __post_init__(self):
        _check_sizes("", embed_dim=self.embed_dim)
        towers = {"image": self.image, "text": self.text}
        for name, tower in towers.items():
            if not getattr(tower, "projection", True) and tower.width != self.embed_dim:
                raise UserError(
                    f"the {name} tower has no projection: embed_dim={self.embed_dim} should be its width={tower.width}"
                )
