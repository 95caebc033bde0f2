"""`load`: a run's folder in; a model that is ready to use, and its preprocessing, out."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clip_jax import tokenizer
from clip_jax.data.transforms import evaluation_crop
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition, Params, normalise_pixels
from clip_jax.models.variants import Architecture
from clip_jax.typing import Float, Int
from clip_jax.workdir import Workdir

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Model:
    """A CLIP with its parameters: every call is compiled, once for each shape of its input."""

    definition: Definition
    params: Params = dataclasses.field(repr=False)
    name: str  # of the architecture, as results name it
    pretrained: str  # where the parameters come from
    results: Path | None = None  # where its evaluations go unless told otherwise; None: it is no run's

    @property
    def architecture(self) -> Architecture:
        return self.definition.architecture

    def encode_image(self, image_BHWC: Float[Array, "B H W C"]) -> Float[jax.Array, "B E"]:
        """Returns image features, not L2-normalised, of preprocessed images.

        Raises:
            UserError: the images are not [n, image_size, image_size, 3].
        """
        size = self.architecture.image.image_size
        if image_BHWC.ndim != 4 or image_BHWC.shape[1:] != (size, size, 3):
            raise UserError(f"images of shape {image_BHWC.shape} do not fit; this model takes [n, {size}, {size}, 3]")
        return _encode_image(self.definition, self.params, jnp.asarray(image_BHWC))

    def encode_text(self, tokens_BL: Int[Array, "B L"]) -> Float[jax.Array, "B E"]:
        """Returns text features, not L2-normalised, of what `tokenize` returns.

        Positions that the model does not have are cut off when they are only padding.

        Raises:
            UserError: a caption is longer than the model's context.
        """
        length = self.architecture.text.context_length
        if tokens_BL.shape[1] > length and np.any(np.argmax(tokens_BL, axis=1) >= length):
            raise UserError(f"a caption is too long for this model's context length {length}; use model.tokenize")
        return _encode_text(self.definition, self.params, jnp.asarray(tokens_BL[:, :length]))

    def __call__(
        self, image_BHWC: Float[Array, "B H W C"], tokens_AL: Int[Array, "A L"]
    ) -> tuple[Float[jax.Array, "B A"], Float[jax.Array, "A B"]]:
        """Returns (logits_per_image, logits_per_text): scaled cosine similarities."""
        return _logits(self.definition, self.params, self.encode_image(image_BHWC), self.encode_text(tokens_AL))

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Int[np.ndarray, "B L"]:
        """Returns token ids of this model's context length."""
        return tokenizer.tokenize(texts, self.architecture.text.context_length, truncate)


@functools.partial(jax.jit, static_argnums=0)
def _encode_image(definition: Definition, params: Params, image_BHWC: jax.Array) -> jax.Array:
    return definition.bind(params).encode_image(image_BHWC)


@functools.partial(jax.jit, static_argnums=0)
def _encode_text(definition: Definition, params: Params, tokens_BL: jax.Array) -> jax.Array:
    return definition.bind(params).encode_text(tokens_BL)


@functools.partial(jax.jit, static_argnums=0)
def _logits(definition: Definition, params: Params, img_BE: jax.Array, txt_AE: jax.Array):
    return definition.bind(params).logits(img_BE, txt_AE)


@dataclasses.dataclass(frozen=True)
class ImagePreprocess:
    """A PIL image in, the tower's input out: float32 [H, W, 3]."""

    architecture: Architecture

    def __call__(self, image: Image.Image) -> Float[np.ndarray, "H W C"]:
        """Returns the resized, cropped and normalised image."""
        pixels_HWC = evaluation_crop(image, self.architecture.image.image_size)
        return np.asarray(normalise_pixels(jnp.asarray(pixels_HWC)[None], self.architecture.preprocess))[0]


def load(source: str | os.PathLike) -> tuple[Model, ImagePreprocess]:
    """Returns (model, preprocess) of a run's folder, with the parameters of its latest checkpoint, in float32.

    Raises:
        UserError: not a run's folder, no checkpoint in it, or one that does not fit its config (lists what differs).
    """
    from clip_jax.training.checkpoint import Checkpoints

    workdir = Workdir(Path(source))
    if not workdir.path.is_dir():
        raise UserError(f"{str(source)!r} cannot be loaded: it is not a folder; give the workdir of a run")
    architecture = workdir.architecture()
    definition = Definition(architecture)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), definition.shapes())
    with Checkpoints(workdir.checkpoints) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{workdir.path} has no checkpoint yet; train it first")
        params = checkpoints.restore_params(step, abstract)
    origin = f"{workdir.path}/checkpoints/{step}"
    model = Model(definition, params, workdir.variant(), origin, workdir.evaluation(step))
    return model, ImagePreprocess(architecture)
