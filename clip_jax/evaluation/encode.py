"""A data set through a model: every image once, in order."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
import rich.console
import rich.progress

from clip_jax import distributed
from clip_jax.architecture import Architecture
from clip_jax.data.pipeline import evaluation_batches
from clip_jax.data.sources import Source
from clip_jax.errors import UserError
from clip_jax.models.clip import l2_normalise, normalise_pixels
from clip_jax.typing import Float, Int

BATCH = 256  # images or texts a call

T = TypeVar("T")


@runtime_checkable
class TextEncoder(Protocol):
    """What evaluation asks of a model for texts."""

    pretrained: str

    def tokenize(self, texts: Sequence[str], truncate: bool = False) -> Int[np.ndarray, "B L"]: ...

    def encode_text(self, tokens_BL: np.ndarray) -> np.ndarray: ...


@runtime_checkable
class Encoder(TextEncoder, Protocol):
    """What evaluation asks of a model; `clip_jax.load` returns one."""

    architecture: Architecture
    name: str

    def encode_image(self, image_BHWC: jax.Array) -> np.ndarray: ...


class Encoded(NamedTuple):
    """A data set's images as the model sees them, and what is known of them; the pixels stay in the source."""

    img_BE: Float[np.ndarray, "B E"]  # L2-normalised
    labels: list[int | None]
    captions: list[tuple[str, ...]]


def encode_images(model: Encoder, source: Source, *, shows: bool = True) -> Encoded:
    """Returns the L2-normalised embedding of every image, in the order of the source; `shows` how far it is.

    Raises:
        UserError: an image that cannot be read, in every process of a run the same; or embeddings that are not finite.
    """
    arch = model.architecture
    features, labels, captions = [], [], []
    batches = _together(
        evaluation_batches(source, image_size=arch.image.image_size, preprocess=arch.preprocess, batch=BATCH)
    )
    console = rich.console.Console(stderr=True)
    total = -(-len(source) // BATCH)
    for images, part in rich.progress.track(
        batches,
        f"{source.name}:{source.split}",
        total=total,
        console=console,
        disable=not (shows and console.is_terminal),
    ):
        embeddings = l2_normalise(model.encode_image(normalise_pixels(images, arch.preprocess)))
        features.append(np.asarray(embeddings))
        labels += [record.label for record in part]
        captions += [record.captions for record in part]
    return Encoded(_finite(np.concatenate(features), model), labels, captions)


def _together(batches: Iterator[T]) -> Iterator[T]:
    """Yields the batches; what one process cannot read no process does: they would wait for it on the devices."""
    while True:
        batch, problem = None, None
        try:
            batch = next(batches, None)
        except UserError as error:
            problem = str(error)
        for found in distributed.gather(problem):
            if found is not None:
                raise UserError(found)
        if batch is None:
            return
        yield batch


def encode_texts(model: TextEncoder, texts: Sequence[str]) -> Float[np.ndarray, "B E"]:
    """Returns the L2-normalised embedding of every text; one that is too long is truncated, as in training."""
    features = []
    for start in range(0, len(texts), BATCH):
        tokens = model.tokenize(texts[start : start + BATCH], truncate=True)
        features.append(np.asarray(l2_normalise(model.encode_text(tokens))))
    return _finite(np.concatenate(features), model)


def _finite(features_BE: Float[np.ndarray, "B E"], model: TextEncoder) -> Float[np.ndarray, "B E"]:
    """Returns the features; NaN compares with nothing, so every metric of a diverged model would be perfect."""
    if not np.isfinite(features_BE).all():
        raise UserError(
            f"{model.pretrained} gives embeddings that are not finite: it has diverged; take an earlier one"
        )
    return features_BE
