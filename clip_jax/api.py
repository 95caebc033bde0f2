"""`load`: a name, a file or a folder in; a model that is ready to use, and its preprocessing, out."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clip_jax import compiled
from clip_jax.architecture import Architecture
from clip_jax.compiled import Placed
from clip_jax.data.transforms import evaluation_crop
from clip_jax.errors import UserError
from clip_jax.files import AnyPath
from clip_jax.models.clip import Definition, Weights, normalise_pixels
from clip_jax.models.layers import Array
from clip_jax.models.text import pooled_at
from clip_jax.models.transformer import Compute
from clip_jax.pretrained import Asked, read
from clip_jax.tokenizer import make
from clip_jax.typing import Float, Int
from clip_jax.weights.download import RELEASES

DTYPES = ("float32", "bfloat16")  # that a model computes in
LEAST_LOGITS = 128  # rows and columns that logits are compiled for; then the powers of two above


@dataclasses.dataclass(frozen=True)
class Model:
    """A CLIP with its weights. Every call is compiled, for a few batch sizes; results are NumPy arrays."""

    definition: Definition
    placed: Placed = dataclasses.field(repr=False)  # as `compiled.place` leaves them
    name: str  # of the architecture, as results name it
    pretrained: str  # where the weights come from
    results: AnyPath | None = None  # where its evaluations go unless told otherwise; None: it is no run's
    tokenizer: str | None = dataclasses.field(default=None, repr=False)  # what its tokenizer.json says, if it has one

    @property
    def architecture(self) -> Architecture:
        return self.definition.architecture

    @property
    def context_length(self) -> int:
        return self.architecture.text.context_length

    @property
    def vocab_size(self) -> int:
        return self.architecture.text.vocab_size

    @property
    def logit_scale(self) -> Float[np.ndarray, ""]:
        """Returns the logarithm of what cosine similarities are multiplied by, as it is learnt."""
        return np.asarray(self.placed.params["logit_scale"])

    @property
    def weights(self) -> Weights:
        """Returns the weights as training has them: a copy, where they are placed otherwise."""
        return compiled.stacked(self.placed, self.definition)

    def encode_image(self, image_BHWC: Float[Array, "B H W C"]) -> Float[np.ndarray, "B E"]:
        """Returns image features, not L2-normalised, of preprocessed images.

        Raises:
            UserError: the images are not [n, image_size, image_size, 3].
        """
        size, image_BHWC = self.architecture.image.image_size, np.asarray(image_BHWC)
        if image_BHWC.ndim != 4 or image_BHWC.shape[1:] != (size, size, 3):
            raise UserError(f"images of shape {image_BHWC.shape} do not fit; this model takes [n, {size}, {size}, 3]")
        if not jnp.issubdtype(image_BHWC.dtype, jnp.floating):
            raise UserError(f"images are {image_BHWC.dtype}, not floats: give what preprocess returns")
        return self._run(compiled.encode_image, image_BHWC)

    def encode_text(self, tokens_BL: Int[Array, "B L"]) -> Float[np.ndarray, "B E"]:
        """Returns text features, not L2-normalised, of what `tokenize` returns.

        Computed up to the longest caption only, where that changes nothing: behind a causal mask.

        Raises:
            UserError: not token ids [n, length], or a caption is longer than the model's context.
        """
        tokens_BL, text = self._checked(tokens_BL), self.architecture.text
        longest = text.context_length
        if not text.sees_padding:
            longest = int(pooled_at(text, tokens_BL).max(initial=0)) + 1
        return compiled.in_pieces(
            lambda rows: compiled.encode_text(
                self.definition, self.placed, compiled.cut(rows, longest, text.context_length)
            ),
            tokens_BL,
        )

    def text_states(
        self, tokens_BL: Int[Array, "B L"], layer: int = -1, *, post_norm: bool = True
    ) -> Float[np.ndarray, "B L D"]:
        """Returns the text tower's states behind one of its blocks (-1: the last) at all positions.

        What image generators are conditioned on. `post_norm` says whether the tower's last layer norm follows, which
        it does in the model itself behind the last block.

        Raises:
            UserError: no such block, or tokens that `encode_text` refuses.
        """
        tokens_BL = self._checked(tokens_BL)[:, : self.context_length]
        depth = self.architecture.text.depth
        if not -depth <= layer < depth:
            raise UserError(f"layer={layer}: the text tower has {depth} blocks, 0 to {depth - 1} or -{depth} to -1")
        return self._run(functools.partial(compiled.text_states, layer=layer % depth, post_norm=post_norm), tokens_BL)

    def __call__(
        self, image_BHWC: Float[Array, "B H W C"], tokens_AL: Int[Array, "A L"]
    ) -> tuple[Float[np.ndarray, "B A"], Float[np.ndarray, "A B"]]:
        """Returns (logits_per_image, logits_per_text): scaled cosine similarities."""
        img_BE, txt_AE = self.encode_image(image_BHWC), self.encode_text(tokens_AL)
        sizes = [max(LEAST_LOGITS, 1 << (len(x) - 1).bit_length()) for x in (img_BE, txt_AE)]
        padded = [compiled.pad(x, size, value=1) for x, size in zip((img_BE, txt_AE), sizes, strict=True)]
        logits_BA = np.asarray(compiled.logits(self.definition, self.placed, *padded))[: len(img_BE), : len(txt_AE)]
        return logits_BA, logits_BA.T

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Int[np.ndarray, "B L"]:
        """Returns token ids of this model's context length, by the tokenizer that it was trained with.

        A text that is too long raises RuntimeError, in OpenAI's words, or loses its end if `truncate`.

        Raises:
            UserError: the tokenizer is in a file, and that did not come with the weights.
        """
        return make(self.architecture.tokenize, self.tokenizer)(texts, self.context_length, truncate)

    def _run(self, encode: Callable[..., jax.Array], inputs: Array) -> np.ndarray:
        return compiled.in_pieces(functools.partial(encode, self.definition, self.placed), inputs)

    def _checked(self, tokens_BL: Array) -> Int[np.ndarray, "B L"]:
        """Returns tokens that the model can take; JAX itself would clamp an id, and wrap a large one."""
        tokens_BL, text = np.asarray(tokens_BL), self.architecture.text
        if tokens_BL.ndim != 2 or tokens_BL.shape[1] == 0 or not np.issubdtype(tokens_BL.dtype, np.integer):
            raise UserError(
                f"tokens are {tokens_BL.dtype} {list(tokens_BL.shape)}, not integers [n, length]; use model.tokenize"
            )
        if tokens_BL.size and not 0 <= tokens_BL.min() <= tokens_BL.max() < text.vocab_size:
            raise UserError(
                f"token ids from {tokens_BL.min()} to {tokens_BL.max()}: this model knows 0 to {text.vocab_size - 1}"
            )
        if text.sees_padding and tokens_BL.shape[1] != text.context_length:
            raise UserError(
                f"tokens are {list(tokens_BL.shape)}, not [n, {text.context_length}]: this model sees what stands "
                "behind a caption; use model.tokenize"
            )
        if (pooled_at(text, tokens_BL) >= text.context_length).any():
            raise UserError(
                f"a caption is too long for this model's context length {text.context_length}; use model.tokenize"
            )
        return tokens_BL.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class ImagePreprocess:
    """PIL images in, the tower's input out."""

    architecture: Architecture

    def __call__(self, image: Image.Image | Iterable) -> Float[np.ndarray, "*n H W C"]:
        """Returns one image resized, cropped and normalised, float32 [H, W, 3]; of several a batch, [n, H, W, 3].

        Raises:
            UserError: what was given is not a PIL image, or one that cannot be read.
        """
        size = self.architecture.image.image_size
        images = [image] if isinstance(image, Image.Image) else list(image) if isinstance(image, Iterable) else [image]
        for i, one in enumerate(images):
            if not isinstance(one, Image.Image):
                raise UserError(f"image {i} is not a PIL image but {type(one).__name__}; open it with PIL.Image.open")
        pixels_BHWC = np.zeros((len(images), size, size, 3), np.uint8)
        for i, one in enumerate(images):
            try:
                pixels_BHWC[i] = evaluation_crop(one, size, self.architecture.preprocess)
            except (OSError, ValueError) as error:  # PIL reads an image only when it is asked for its pixels
                raise UserError(f"image {i} cannot be prepared: {error}") from error
        batch_BHWC = normalise_pixels(pixels_BHWC, self.architecture.preprocess)
        return batch_BHWC[0] if isinstance(image, Image.Image) else batch_BHWC


def available_models() -> list[str]:
    """Returns the names of OpenAI's models, in its order."""
    return list(RELEASES)


def load(
    source: str | os.PathLike,
    device: str | jax.Device | None = None,
    *,
    variant: str | None = None,
    activation: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    dtype: str = "float32",
    download_root: str | os.PathLike | None = None,
) -> tuple[Model, ImagePreprocess]:
    """Returns (model, preprocess) of a name of `available_models()`, a file of OpenAI's, a folder of OpenCLIP's or
    Hugging Face's or one that `convert_weights.py` wrote, "hf://org/repo[@revision]", the workdir of a run (its latest
    checkpoint; gs://BUCKET/FOLDER, too), WORKDIR/checkpoints/STEP, or a lone state dict whose `variant` is told.

    Parameters are float32, on `device` ("cpu", "cuda", "tpu" or one of JAX's; None: JAX's first). `dtype` is what is
    computed in, "float32" or "bfloat16"; a `variant` that is given is what the weights must be; `activation`
    ("quick_gelu", "gelu", "gelu_tanh") is computed whatever the weights say of themselves; for another `image_size` or
    `context_length` than theirs the position embeddings are resized; `download_root` is the folder for OpenAI's files
    (else `CLIP_JAX_CACHE`, else ~/.cache/clip); what comes from a hub is in the cache of `huggingface_hub`.

    Raises:
        UserError: nothing of that name, damaged, or not what was asked (lists what differs).
    """
    if dtype not in DTYPES:
        raise UserError(f"{dtype=} is not one of {', '.join(DTYPES)}")
    device = _device(device)
    asked = Asked(variant, activation, image_size, context_length)
    bundle = read(source, asked, dtype=np.float32, download_root=download_root)
    definition = Definition(bundle.architecture, Compute(dtype))
    placed = compiled.place(bundle.arrays, definition, device)
    model = Model(definition, placed, bundle.variant, bundle.origin, bundle.results, bundle.tokenizer)
    return model, ImagePreprocess(bundle.architecture)


def _device(device: str | jax.Device | None) -> jax.Device:
    """Returns the device of a name, or JAX's first."""
    if isinstance(device, jax.Device):
        return device
    try:
        return jax.devices(device)[0]
    except RuntimeError as error:
        there = sorted({device.platform for device in jax.devices()} | {"cpu"})
        raise UserError(f"{device=} is not to be had here; there are: {', '.join(there)}") from error
