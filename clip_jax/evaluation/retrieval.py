"""Text-to-image and image-to-text retrieval: how many come before a right partner, counted on the devices.

Cosines are computed by blocks of texts × images, each once, for both directions; the matrix of all is nowhere.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.config import MeshConfig
from clip_jax.typing import Float, Int

RECALLS_AT = (1, 5, 10)
# Of a block: texts a device has of it, and images. Where a row is computed, and with how many, changes its last bit, so
# a device's part is as large on any number of devices.
# The scores of a block are 4 MB: at 16 MB a CPU takes new memory for each, which costs as much as the products.
TEXTS, IMAGES = 256, 4096


class Ranks(NamedTuple):
    """How many come before the right one; 0: it is the nearest."""

    images: Int[np.ndarray, " A"]  # for every text: images before its own
    texts: Int[np.ndarray, " B"]  # for every image: texts before the nearest of its own


def ranks(
    txt_AE: Float[np.ndarray, "A E"],
    img_BE: Float[np.ndarray, "B E"],
    image_of_text: Int[np.ndarray, " A"],
    mesh: Mesh | None = None,
) -> Ranks:
    """Returns the ranks of L2-normalised embeddings, of which every device of the mesh counts its share; None: of this
    process's devices the first counts all.

    Among equals the earlier comes first, as it would if all were sorted; equals must count: a collapsed model, to which
    all are equal, would otherwise find everything. An image that no text is of has all of them before its own.
    All processes of a mesh call it alike, and each returns the same.
    """
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
    blocks = _Blocks(txt_AE, img_BE, mesh)
    image_of_text = np.asarray(image_of_text, np.int32)
    own_A = blocks.own(image_of_text)  # first, for an image's best is only known when all of its own are
    best_B = np.full(len(img_BE), -np.inf, np.float32)
    np.maximum.at(best_B, image_of_text, own_A)
    at_B = np.full(len(img_BE), len(txt_AE), np.int32)
    is_best = own_A == best_B[image_of_text]
    np.minimum.at(at_B, image_of_text[is_best], np.flatnonzero(is_best).astype(np.int32))
    return blocks.before(own_A, image_of_text, best_B, at_B)


class _Own(NamedTuple):
    """What is known of the right ones; padding has a cosine that nothing is below."""

    score: Float[jax.Array, " n"]
    at: Int[jax.Array, " n"]


class _Blocks:
    """All texts and images, cut into blocks."""

    def __init__(self, txt_AE: Float[np.ndarray, "A E"], img_BE: Float[np.ndarray, "B E"], mesh: Mesh):
        self._mesh, self._sizes = mesh, _Sizes(len(txt_AE), len(img_BE))
        self._rows = TEXTS * mesh.shape["data"] * mesh.shape["fsdp"]
        self._txt = [self._placed(x, self._rows, sharding.BATCH) for x in _pieces(txt_AE, self._rows)]
        self._img = [self._placed(x, IMAGES, P()) for x in _pieces(img_BE, IMAGES)]
        self._block = _compiled(mesh)

    def own(self, image_of_text: Int[np.ndarray, " A"]) -> Float[np.ndarray, " A"]:
        """Returns every text's cosine with its own image."""
        none = np.zeros(max(self._sizes), np.float32)  # nothing is counted yet
        texts = self._of_texts(none[: self._sizes.texts], image_of_text)
        images = self._of_images(none[: self._sizes.images], none[: self._sizes.images].astype(np.int32))
        found = []
        for t, txt in enumerate(self._txt):
            here = image_of_text[t * self._rows : (t + 1) * self._rows]
            scores = [
                self._block(txt, self._img[i], texts[t], images[i], (t, i), self._sizes)[0]
                for i in np.unique(here // IMAGES)
            ]
            found.append(functools.reduce(jnp.maximum, scores))
        return self._gathered(found)[: self._sizes.texts]

    def before(
        self,
        own_A: Float[np.ndarray, " A"],
        image_of_text: Int[np.ndarray, " A"],
        best_B: Float[np.ndarray, " B"],
        at_B: Int[np.ndarray, " B"],
    ) -> Ranks:
        """Returns how many come before each right one."""
        texts, images = self._of_texts(own_A, image_of_text), self._of_images(best_B, at_B)
        of_texts, of_images = [0] * len(texts), [0] * len(images)
        for t in range(len(texts)):
            for i in range(len(images)):
                _, of_text, of_image = self._block(self._txt[t], self._img[i], texts[t], images[i], (t, i), self._sizes)
                of_texts[t], of_images[i] = of_texts[t] + of_text, of_images[i] + of_image
        return Ranks(self._gathered(of_texts)[: self._sizes.texts], np.concatenate(of_images)[: self._sizes.images])

    def _of_texts(self, score_A: Float[np.ndarray, " A"], at_A: Int[np.ndarray, " A"]) -> list[_Own]:
        return self._owned(score_A, at_A, self._rows, sharding.BATCH)

    def _of_images(self, score_B: Float[np.ndarray, " B"], at_B: Int[np.ndarray, " B"]) -> list[_Own]:
        return self._owned(score_B, at_B, IMAGES, P())

    def _owned(self, score: np.ndarray, at: np.ndarray, rows: int, spec: P) -> list[_Own]:
        scores = (self._placed(x, rows, spec, np.inf) for x in _pieces(score, rows))
        return list(map(_Own, scores, (self._placed(x, rows, spec) for x in _pieces(at, rows))))

    def _placed(self, x: np.ndarray, rows: int, spec: P, padding: float = 0) -> jax.Array:
        """Returns rows on the mesh, filled up to so many."""
        fill = [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)]
        whole = np.pad(x, fill, constant_values=padding)
        place = NamedSharding(self._mesh, spec)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    def _gathered(self, parts: list[jax.Array]) -> np.ndarray:
        """Returns the parts, which lie over the devices, one after the other, in every process all."""
        everywhere = NamedSharding(self._mesh, P())
        return np.concatenate([np.asarray(jax.device_put(part, everywhere).addressable_data(0)) for part in parts])


@functools.lru_cache(8)
def _compiled(mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    by_text, everywhere = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, P())
    return jax.jit(_block, out_shardings=(by_text, by_text, everywhere))


def _pieces(x: np.ndarray, rows: int) -> list[np.ndarray]:
    return [x[start : start + rows] for start in range(0, len(x), rows)]


class _Sizes(NamedTuple):
    """How many there are; what fills up the last blocks comes before nothing."""

    texts: int
    images: int


def _block(
    txt_QE: Float[jax.Array, "Q E"],
    img_ME: Float[jax.Array, "M E"],
    of_texts: _Own,
    of_images: _Own,
    block: tuple[jax.Array, jax.Array],
    sizes: _Sizes,
) -> tuple[Float[jax.Array, " Q"], Int[jax.Array, " Q"], Int[jax.Array, " M"]]:
    """Returns of a block each text's cosine with its own image (-inf: that is in another block), how many images come
    before that, and how many texts before each image's own. `block` is its place among texts and among images.

    One program for all three: a cosine that is computed by two may be two numbers.
    """
    scores_QM = jnp.matmul(txt_QE, img_ME.T, precision=jax.lax.Precision.HIGHEST)
    text_Q1 = (block[0] * len(txt_QE) + jnp.arange(len(txt_QE)))[:, None]
    image_1M = (block[1] * len(img_ME) + jnp.arange(len(img_ME)))[None]
    score_Q1, at_Q1 = (x[:, None] for x in of_texts)
    score_1M, at_1M = (x[None] for x in of_images)
    own_Q = jnp.max(scores_QM, axis=1, where=image_1M == at_Q1, initial=-jnp.inf)
    images_before = (scores_QM > score_Q1) | ((scores_QM == score_Q1) & (image_1M < at_Q1))
    texts_before = (scores_QM > score_1M) | ((scores_QM == score_1M) & (text_Q1 < at_1M))
    return (
        own_Q,
        jnp.sum(images_before & (image_1M < sizes.images), axis=1, dtype=jnp.int32),
        jnp.sum(texts_before & (text_Q1 < sizes.texts), axis=0, dtype=jnp.int32),
    )


def names(recalls: Sequence[int]) -> tuple[str, ...]:
    """Returns the metrics in CLIP_benchmark's names and order."""
    return tuple(f"{which}_retrieval_recall@{k}" for k in recalls for which in ("image", "text"))


def metrics(ranks: Ranks, recalls: Sequence[int] = RECALLS_AT) -> dict[str, float]:
    """Returns the share of texts whose image, and of images one of whose texts, is among the K nearest."""
    found = (float((of_which < k).mean()) for k in recalls for of_which in (ranks.images, ranks.texts))
    return dict(zip(names(recalls), found, strict=True))
