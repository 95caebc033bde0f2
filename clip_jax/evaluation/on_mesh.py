"""A model that is being trained, as evaluation asks for it: on all devices, with the weights where they are."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.architecture import Architecture
from clip_jax.evaluation.encode import BATCH
from clip_jax.models.clip import Definition, Weights
from clip_jax.tokenizer import Tokenizer
from clip_jax.typing import Float, Int


class OnMesh:
    """Encodes images and texts, of which every device has its share. All processes of a run call it alike."""

    def __init__(self, definition: Definition, mesh: Mesh, tokenizer: Tokenizer, *, name: str, pretrained: str):
        """`name` is the architecture's, and `pretrained` says whose weights they are."""
        self.name, self.pretrained = name, pretrained
        self._mesh, self._tokenizer = mesh, tokenizer
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch = -(-BATCH // ways) * ways  # one program, whatever is left at the end of a data set
        rows = NamedSharding(mesh, sharding.BATCH)
        self._definition = definition.computed(remat="none", patch_dropout=0.0, rows=rows)
        self._encode = {
            tower: jax.jit(functools.partial(self._encoded, tower), out_shardings=NamedSharding(mesh, P()))
            for tower in ("encode_image", "encode_text")
        }
        self.weights: Weights | None = None  # are to be set before it is asked

    @property
    def architecture(self) -> Architecture:
        return self._definition.architecture

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Int[np.ndarray, "B L"]:
        """Returns token ids; see `clip_jax.api.Model.tokenize`."""
        return self._tokenizer(texts, self.architecture.text.context_length, truncate)

    def encode_image(self, image_BHWC: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B E"]:
        """Returns image features, not L2-normalised, in every process those of all images."""
        return self._all("encode_image", image_BHWC)

    def encode_text(self, tokens_BL: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B E"]:
        """Returns text features, not L2-normalised, in every process those of all texts."""
        return self._all("encode_text", tokens_BL)

    def _all(self, tower: str, x: np.ndarray) -> np.ndarray:
        """Returns what a tower makes of at most a batch of inputs; those that fill it up are left out again."""
        filled = np.concatenate([x, np.zeros((self._batch - len(x), *x.shape[1:]), x.dtype)])
        here = filled[sharding.host_rows(self._batch, self._mesh)]
        features = self._encode[tower](self.weights, sharding.to_mesh(here, self._batch, self._mesh))
        return np.asarray(features.addressable_data(0), np.float32)[: len(x)]

    def _encoded(self, tower: str, weights: Weights, x: jax.Array) -> jax.Array:
        return getattr(self._definition.bind(weights), tower)(x)
