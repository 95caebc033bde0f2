"""`load`: a name, a file or a folder in; a model that is ready to use, and its preprocessing, out."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from clip_jax import compiled, tokenizer
from clip_jax.compiled import Placed
from clip_jax.config import COMPUTE_DTYPES, ModelConfig, leaves
from clip_jax.data.transforms import evaluation_crop
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition, Weights, normalise_pixels
from clip_jax.models.variants import Architecture, architecture
from clip_jax.pretrained import read
from clip_jax.typing import Float, Int
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.download import RELEASES

Array = jax.Array | np.ndarray

# Where captions are cut: a caption's features are the same at all lengths that hold it.
TEXT_LENGTHS = (16, 24, 32, 48, 77)  # and the context length itself


@dataclasses.dataclass(frozen=True)
class Model:
    """A CLIP with its weights. Every call is compiled, for a few batch sizes; results are NumPy arrays."""

    definition: Definition
    placed: Placed = dataclasses.field(repr=False)  # as `compiled.place` leaves them
    name: str  # of the architecture, as results name it
    pretrained: str  # where the weights come from
    results: Path | None = None  # where its evaluations go unless told otherwise; None: it is no run's

    @property
    def architecture(self) -> Architecture:
        return self.definition.architecture

    @property
    def weights(self) -> Weights:
        """Returns the weights as training has them: a copy, where they are placed otherwise."""
        return compiled.stacked(self.placed, self.definition)

    def encode_image(self, image_BHWC: Float[Array, "B H W C"]) -> Float[np.ndarray, "B E"]:
        """Returns image features, not L2-normalised, of preprocessed images.

        Raises:
            UserError: the images are not [n, image_size, image_size, 3].
        """
        size = self.architecture.image.image_size
        if image_BHWC.ndim != 4 or image_BHWC.shape[1:] != (size, size, 3):
            raise UserError(f"images of shape {image_BHWC.shape} do not fit; this model takes [n, {size}, {size}, 3]")
        return self._run(compiled.encode_image, image_BHWC)

    def encode_text(self, tokens_BL: Int[Array, "B L"]) -> Float[np.ndarray, "B E"]:
        """Returns text features, not L2-normalised, of what `tokenize` returns.

        Computed up to the longest caption only: the mask is causal, so nothing behind an EOT is ever seen.

        Raises:
            UserError: a caption is longer than the model's context.
        """
        return self._run(compiled.encode_text, self._cut(tokens_BL))

    def text_states(
        self, tokens_BL: Int[Array, "B L"], layer: int = -1, *, post_norm: bool = True
    ) -> Float[np.ndarray, "B L D"]:
        """Returns the text tower's states behind one of its blocks (-1: the last) at all positions.

        What image generators are conditioned on. `post_norm` says whether the tower's last layer norm follows, which
        it does in the model itself behind the last block.

        Raises:
            UserError: no such block.
        """
        depth = self.architecture.text.depth
        if not -depth <= layer < depth:
            raise UserError(f"layer={layer}: the text tower has {depth} blocks, 0 to {depth - 1} or -{depth} to -1")
        return self._run(functools.partial(compiled.text_states, layer=layer % depth, post_norm=post_norm), tokens_BL)

    def __call__(
        self, image_BHWC: Float[Array, "B H W C"], tokens_AL: Int[Array, "A L"]
    ) -> tuple[Float[np.ndarray, "B A"], Float[np.ndarray, "A B"]]:
        """Returns (logits_per_image, logits_per_text): scaled cosine similarities."""
        img_BE, txt_AE = self.encode_image(image_BHWC), self.encode_text(tokens_AL)
        sizes = [sum(size for _, size in compiled.pieces(len(x))) for x in (img_BE, txt_AE)]
        padded = [compiled.pad(x, size, value=1) for x, size in zip((img_BE, txt_AE), sizes, strict=True)]
        logits_BA = np.asarray(compiled.logits(self.definition, self.placed, *padded))[: len(img_BE), : len(txt_AE)]
        return logits_BA, logits_BA.T

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Int[np.ndarray, "B L"]:
        """Returns token ids of this model's context length."""
        return tokenizer.tokenize(texts, self.architecture.text.context_length, truncate)

    def _run(self, encode: Callable[..., jax.Array], inputs: Array) -> np.ndarray:
        return compiled.in_pieces(functools.partial(encode, self.definition, self.placed), inputs)

    def _cut(self, tokens_BL: Int[Array, "B L"]) -> Int[np.ndarray, "B M"]:
        """Returns the tokens up to the first of the lengths that holds every caption, padded to it where needed."""
        tokens_BL = np.asarray(tokens_BL)
        context_length = self.architecture.text.context_length
        longest = int(np.argmax(tokens_BL, axis=1).max(initial=0)) + 1
        if longest > context_length:
            raise UserError(
                f"a caption is too long for this model's context length {context_length}; use model.tokenize"
            )
        length = min([n for n in TEXT_LENGTHS if n >= longest] + [context_length])
        return np.pad(tokens_BL[:, :length], ((0, 0), (0, max(0, length - tokens_BL.shape[1]))))


@dataclasses.dataclass(frozen=True)
class ImagePreprocess:
    """PIL images in, the tower's input out."""

    architecture: Architecture

    def __call__(self, image: Image.Image | Iterable) -> Float[np.ndarray, "*n H W C"]:
        """Returns one image resized, cropped and normalised, float32 [H, W, 3]; of several a batch, [n, H, W, 3].

        Raises:
            UserError: what was given is not a PIL image.
        """
        size = self.architecture.image.image_size
        images = [image] if isinstance(image, Image.Image) else list(image) if isinstance(image, Iterable) else [image]
        for i, one in enumerate(images):
            if not isinstance(one, Image.Image):
                raise UserError(f"image {i} is not a PIL image but {type(one).__name__}; open it with PIL.Image.open")
        pixels_BHWC = np.zeros((len(images), size, size, 3), np.uint8)
        for one, pixels_HWC in zip(images, pixels_BHWC, strict=True):
            pixels_HWC[...] = evaluation_crop(one, size)
        batch_BHWC = normalise_pixels(pixels_BHWC, self.architecture.preprocess)
        return batch_BHWC[0] if isinstance(image, Image.Image) else batch_BHWC


def available_models() -> list[str]:
    """Returns the names of OpenAI's models, in its order."""
    return list(RELEASES)


def load(
    source: str | os.PathLike,
    *,
    variant: str | None = None,
    dtype: str = "float32",
    download_root: str | os.PathLike | None = None,
) -> tuple[Model, ImagePreprocess]:
    """Returns (model, preprocess) of a name of `available_models()`, a file of OpenAI's, a folder that
    `convert_weights.py` wrote, or the workdir of a run (its latest checkpoint).

    Parameters are float32. `dtype` is what is computed in, "float32" or "bfloat16"; a `variant` that is given is what
    the weights must be; `download_root` is the folder for released files (else `CLIP_JAX_CACHE`, else ~/.cache/clip).

    Raises:
        UserError: nothing of that name, damaged, or not what was asked (lists what differs).
    """
    if dtype not in COMPUTE_DTYPES:
        raise UserError(f"{dtype=} is not one of {', '.join(COMPUTE_DTYPES)}")
    bundle = read(source, dtype=np.float32, download_root=download_root)
    if variant is not None:
        _check_variant(bundle, variant)
    definition = Definition(bundle.architecture, dtype=dtype)
    placed = compiled.place(bundle.arrays, definition)
    model = Model(definition, placed, bundle.variant, bundle.origin, bundle.results)
    return model, ImagePreprocess(bundle.architecture)


def _check_variant(bundle: Bundle, variant: str) -> None:
    """Raises UserError, with all that differs, when the weights are not those of the variant that was asked for."""
    asked = {path: value for path, _, value in leaves(architecture(ModelConfig(variant)))}
    found = {path: value for path, _, value in leaves(bundle.architecture)}
    differences = [
        f"{path} is {found.get(path)!r}, not {asked.get(path)!r}"
        for path in sorted(asked.keys() | found.keys())
        if asked.get(path) != found.get(path)
    ]
    if differences:
        raise UserError(f"{bundle.origin} is no {variant}: {'; '.join(differences)}")
