"""CLIP (arXiv 2103.00020): two towers, one space, one temperature.

Three facts live here and nowhere else: pixels are normalised, embeddings are L2-normalised, and `logit_scale` is stored
as a logarithm and kept at or below ln 100 (but for SigLIP, arXiv 2303.15343, whose loss has a bias and no limit).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clip_jax.architecture import Architecture, Preprocess
from clip_jax.models.layers import Array
from clip_jax.models.resnet import ResNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.transformer import Compute
from clip_jax.models.vit import ViT
from clip_jax.typing import Float, Int, UInt8

IMAGE_TOWERS = {"vit": ViT, "resnet": ResNet}  # by the architecture's word
LOGIT_SCALE_INIT = math.log(1 / 0.07)
LOGIT_SCALE_MAX = math.log(100)
SIGLIP_SCALE_INIT, SIGLIP_BIAS_INIT = math.log(10), -10.0  # arXiv 2303.15343, section 3.2

Params = dict  # nested dicts of arrays; the keys are the modules' attribute names


class Weights(NamedTuple):
    """All that a model has learnt."""

    params: Params
    statistics: Params  # what batch norm has seen: no gradient reaches it; empty without batch norm


class CLIP(nnx.Module):
    """An image tower and a text tower that meet in `embed_dim` dimensions."""

    def __init__(self, architecture: Architecture, compute: Compute, *, key: jax.Array):
        image, text = jax.random.split(key)
        image_tower = IMAGE_TOWERS[architecture.image.kind]
        self.image = image_tower(architecture.image, architecture.embed_dim, compute, key=image)
        self.text = TextTransformer(architecture.text, architecture.embed_dim, compute, key=text)
        self.logit_scale = nnx.Param(jnp.float32(SIGLIP_SCALE_INIT if architecture.logit_bias else LOGIT_SCALE_INIT))
        self.logit_bias = nnx.Param(jnp.float32(SIGLIP_BIAS_INIT)) if architecture.logit_bias else None

    def encode_image(
        self, image_BHWC: Float[jax.Array, "B H W C"], *, train: bool = False, dropout_B: jax.Array | None = None
    ) -> Float[jax.Array, "B E"]:
        """Returns image embeddings, not L2-normalised, in the compute dtype.

        With `train`, batch norm goes by the batch and its statistics move: `statistics` returns them. `dropout_B` are
        random keys, one an image: with them a ViT leaves patches out.
        """
        only_vit = {} if dropout_B is None else {"dropout_B": dropout_B}
        return self.image(image_BHWC, train=train, **only_vit)

    def encode_text(self, tokens_BL: Int[jax.Array, "B L"]) -> Float[jax.Array, "B E"]:
        """Returns text embeddings, not L2-normalised, in the compute dtype."""
        return self.text(tokens_BL)

    def statistics(self) -> Params:
        """Returns the running statistics of batch norm as they are now."""
        return nnx.to_pure_dict(nnx.state(self, nnx.BatchStat))

    def bias(self) -> Float[jax.Array, ""] | None:
        """Returns what is added to scaled cosines; None: nothing."""
        return None if self.logit_bias is None else self.logit_bias[...]

    def scale(self) -> Float[jax.Array, ""]:
        """Returns what cosine similarities are multiplied by: 1/temperature."""
        return jnp.exp(self.logit_scale[...])

    def __call__(
        self, image_BHWC: Float[jax.Array, "B H W C"], tokens_AL: Int[jax.Array, "A L"]
    ) -> tuple[Float[jax.Array, "B A"], Float[jax.Array, "A B"]]:
        """Returns (logits_per_image, logits_per_text): scaled cosine similarities, with SigLIP's bias where there is
        one, float32 or wider."""
        return self.logits(self.encode_image(image_BHWC), self.encode_text(tokens_AL))

    def logits(
        self, img_BE: Float[jax.Array, "B E"], txt_AE: Float[jax.Array, "A E"]
    ) -> tuple[Float[jax.Array, "B A"], Float[jax.Array, "A B"]]:
        """Returns (logits_per_image, logits_per_text) of embeddings that are not normalised yet."""
        cosines_BA = jnp.matmul(l2_normalise(img_BE), l2_normalise(txt_AE).T, precision=jax.lax.Precision.HIGHEST)
        logits_BA = self.scale() * cosines_BA
        if self.logit_bias is not None:
            logits_BA = logits_BA + self.bias()
        return logits_BA, logits_BA.T


@dataclasses.dataclass(frozen=True)
class Definition:
    """A CLIP without its weights, which travel apart as plain nested dicts: cheap to pass through `jax.jit`."""

    architecture: Architecture
    compute: Compute = dataclasses.field(default_factory=Compute)

    def computed(self, **changes: Any) -> "Definition":
        """Returns the same CLIP, computed another way: with fields of `Compute` changed."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, **changes))

    def init(self, key: jax.Array) -> Weights:
        """Returns weights as OpenAI initialises them, drawn in float32; as wide as what they are to compute."""
        model = self._build(key)
        weights = Weights(nnx.to_pure_dict(nnx.state(model, nnx.Param)), model.statistics())
        wide = self.compute.wide
        return jax.tree.map(lambda x: x.astype(wide) if jnp.issubdtype(x.dtype, jnp.floating) else x, weights)

    def shapes(self) -> Weights:
        """Returns the weights' shapes and dtypes, computing nothing."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def bind(self, weights: Weights) -> CLIP:
        """Returns the model that has these weights."""
        graph = nnx.graphdef(jax.eval_shape(self._build, jax.random.key(0)))
        return nnx.merge(graph, weights.params, weights.statistics)

    def _build(self, key: jax.Array) -> CLIP:
        return CLIP(self.architecture, self.compute, key=key)


def l2_normalise(x_BE: Float[Array, "B E"]) -> Float[jax.Array, "B E"]:
    """Returns rows of length one, float32 or wider."""
    x_BE = x_BE.astype(jnp.promote_types(x_BE.dtype, jnp.float32))
    return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)


def normalise_pixels(
    image_BHWC: UInt8[Array, "B H W C"], preprocess: Preprocess, dtype: np.dtype | type = np.float32
) -> Float[Array, "B H W C"]:
    """Returns pixels in `dtype` with the mean and deviation that the tower expects; NumPy in, NumPy out."""
    return (image_BHWC.astype(dtype) / 255 - np.asarray(preprocess.mean, dtype)) / np.asarray(preprocess.std, dtype)


def constrain(params: Params) -> Params:
    """Returns parameters whose `logit_scale` is at most ln 100, as in the paper (section 2.5); SigLIP has no limit.

    Applied to the stored value after each update, not inside the forward pass: a clipped forward has no gradient beyond
    the limit, and a parameter that momentum carried there would never come back.
    """
    if "logit_bias" in params:
        return params
    return params | {"logit_scale": jnp.minimum(params["logit_scale"], LOGIT_SCALE_MAX)}
