"""A model as evaluation asks for it: on all devices, with its weights where they are, a run's or a released one's.

Every device computes `batch_size` rows a call, however many devices there are: the same program, and so the same
numbers, on one and on all.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import compiled, sharding
from clip_jax.architecture import Architecture
from clip_jax.models.clip import Definition, Weights, l2_normalise, normalise_pixels
from clip_jax.models.text import pooled_at
from clip_jax.models.transformer import Compute
from clip_jax.models.vit import ViT
from clip_jax.tokenizer import Tokenizer, make
from clip_jax.typing import Float, Int, UInt8
from clip_jax.weights.bundle import Bundle

BATCH = 64  # images or texts a device and call, as in CLIP_benchmark
TEXT_LENGTHS = compiled.TEXT_LENGTHS[max(compiled.BATCH_SIZES)]  # that calls are compiled for, beside the context's

# What is made of an image: its embedding, L2-normalised; that before it is normalised; what the projection gets (of a
# ResNet, whose attention pool projects, and of a tower without a projection that is the embedding).
FEATURES = ("embedding", "projected", "pooled")


class OnMesh:
    """Encodes images and texts, of which every device has its share. All processes of a mesh call it alike."""

    def __init__(
        self,
        definition: Definition,
        mesh: Mesh,
        tokenizer: Tokenizer,
        *,
        name: str,
        pretrained: str,
        weights: Weights | None = None,
        batch_size: int = BATCH,
    ):
        """`name` is the architecture's, `pretrained` says whose weights they are; a run sets `weights` later."""
        self.name, self.pretrained, self.mesh, self.weights = name, pretrained, mesh, weights
        self.fingerprint: str | None = None  # of all weights, what they mean and the dtype; None: they change
        self._tokenizer = tokenizer
        self.batch = batch_size * mesh.shape["data"] * mesh.shape["fsdp"]  # rows of all devices
        self.rows = sharding.host_rows(self.batch, mesh)  # of those, this process's
        self._by_row = NamedSharding(mesh, sharding.BATCH)
        self._definition = definition.computed(remat="none", patch_dropout=0.0, rows=self._by_row)
        self._encode_image = jax.jit(self._image_features, static_argnums=2, out_shardings=self._by_row)
        self._encode_text = jax.jit(self._text_embeddings, out_shardings=self._by_row)

    @classmethod
    def of(cls, bundle: Bundle, mesh: Mesh, *, dtype: str = "float32", batch_size: int = BATCH) -> "OnMesh":
        """Returns a model that was read, its weights on every device in float32; `dtype` is what is computed in."""
        definition = Definition(bundle.architecture, Compute(dtype))

        digest = hashlib.sha256(f"{dataclasses.asdict(bundle.architecture)} {bundle.tokenizer} {dtype}".encode())

        def put(keys: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
            x = np.asarray(bundle.arrays[sharding.path_of(keys)], like.dtype, order="C")
            digest.update(f"{sharding.path_of(keys)} {x.shape}".encode())
            digest.update(x.reshape(-1).data)
            return _everywhere(x, mesh)

        weights = Weights(*(jax.tree_util.tree_map_with_path(put, tree) for tree in definition.shapes()))
        tokenizer = make(bundle.architecture.tokenize, bundle.tokenizer)
        about = {"name": bundle.variant, "pretrained": bundle.origin, "batch_size": batch_size}
        model = cls(definition, mesh, tokenizer, weights=weights, **about)
        model.fingerprint = digest.hexdigest()
        return model

    @property
    def architecture(self) -> Architecture:
        return self._definition.architecture

    def scale(self) -> Float[np.ndarray, ""]:
        """Returns what cosine similarities are multiplied by."""
        return np.asarray(np.exp(np.asarray(self.weights.params["logit_scale"].addressable_data(0))))

    def encode_image(self, image_bHWC: UInt8[np.ndarray, "b H W C"], feature: str = FEATURES[0]) -> jax.Array:
        """Returns one of `FEATURES` of a batch of pixels [batch, E] on the mesh; each process gives its own rows."""
        return self._encode_image(self.weights, sharding.to_mesh(image_bHWC, self.batch, self.mesh), feature)

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Returns token ids; a text that is too long is truncated, as in training."""
        return self._tokenizer(texts, self.architecture.text.context_length, True)

    def text_lengths(self, tokens_BL: Int[np.ndarray, "B L"]) -> Int[np.ndarray, " B"]:
        """Returns how much of each text is computed: behind a causal mask nothing after its end is seen.

        A text alone says it, whatever stands beside it.
        """
        text = self.architecture.text
        if text.sees_padding:
            return np.full(len(tokens_BL), text.context_length)
        known = np.array([*(n for n in TEXT_LENGTHS if n < text.context_length), text.context_length])
        return known[np.searchsorted(known, np.asarray(pooled_at(text, tokens_BL)) + 1)]

    def encode_text(self, tokens_BL: Int[np.ndarray, "B L"]) -> jax.Array:
        """Returns L2-normalised embeddings [batch, E] on the mesh; each process gives all rows, of one length."""
        return self._encode_text(self.weights, sharding.to_mesh(tokens_BL[self.rows], self.batch, self.mesh))

    def everywhere(self, x: np.ndarray) -> jax.Array:
        """Returns an array that every device has; every process gives the same."""
        return _everywhere(x, self.mesh)

    def gathered(self, x: jax.Array) -> np.ndarray:
        """Returns the whole of what lies over the devices, in every process."""
        return np.asarray(jax.device_put(x, NamedSharding(self.mesh, P())).addressable_data(0))

    def _image_features(self, weights: Weights, image_BHWC: jax.Array, feature: str) -> jax.Array:
        model = self._definition.bind(weights)
        if feature == "pooled" and isinstance(model.image, ViT):
            model.image.projection = None
        pixels_BHWC = normalise_pixels(image_BHWC, self.architecture.preprocess, self._definition.compute.wide)
        features_BE = model.encode_image(pixels_BHWC)
        wide_BE = features_BE.astype(jnp.promote_types(features_BE.dtype, jnp.float32))
        return l2_normalise(wide_BE) if feature == "embedding" else wide_BE

    def _text_embeddings(self, weights: Weights, tokens_BL: jax.Array) -> jax.Array:
        return l2_normalise(self._definition.bind(weights).encode_text(tokens_BL))


def _everywhere(x: np.ndarray, mesh: Mesh) -> jax.Array:
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), x.__getitem__)
