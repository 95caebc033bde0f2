"""The table of architectures: OpenAI's parameter counts, every name's shapes, and what is said of bad sizes."""

import math

import jax
import jax.numpy as jnp
import pytest

from clip_jax.config import ModelConfig
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP, Definition
from clip_jax.models.variants import VARIANTS, TextTower, architecture


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B/32", 151_277_313),
        ("ViT-B/16", 149_620_737),
        ("ViT-L/14", 427_616_513),
        ("ViT-L/14@336px", 427_944_193),
    ],
)
def test_openais_models_have_openais_number_of_parameters(name, expected):
    shapes = jax.tree.leaves(Definition(VARIANTS[name]).shapes().params)
    assert sum(math.prod(x.shape) for x in shapes) == expected
    assert {x.dtype for x in shapes} == {jnp.dtype("float32")}


def outputs(name: str, **changes):
    """Returns the shapes of features and logits of 3 images and 5 captions."""
    arch = architecture(ModelConfig(variant=name, **changes))
    definition = Definition(arch)
    image = jax.ShapeDtypeStruct((3, arch.image.image_size, arch.image.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((5, arch.text.context_length), jnp.int32)

    def run(weights, image, tokens):
        model: CLIP = definition.bind(weights)
        return model.encode_image(image), model.encode_text(tokens), *model(image, tokens)

    return [x.shape for x in jax.eval_shape(run, definition.shapes(), image, tokens)]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_its_own_images_and_captions(name):
    embed_dim = VARIANTS[name].embed_dim
    assert outputs(name) == [(3, embed_dim), (5, embed_dim), (3, 5), (5, 3)]


def test_image_size_and_context_length_may_be_changed_and_nothing_else_changes():
    name = "ViT-W64/4@16px"
    changed = architecture(ModelConfig(variant=name, image_size=24, context_length=9))
    assert (changed.image.num_patches, changed.text.context_length) == (36, 9)
    assert outputs(name, image_size=24, context_length=9) == outputs(name)
    assert architecture(ModelConfig(variant=name, image_size=16, context_length=16)) == VARIANTS[name]


@pytest.mark.parametrize(("size", "nearest"), [(30, "28 and 32"), (3, "4 and 8"), (0, "4 and 8"), (-8, "4 and 8")])
def test_an_image_size_that_the_patch_does_not_divide_is_refused_with_the_nearest(size, nearest):
    with pytest.raises(UserError, match=f"image_size={size} .*patch_size=4.*{nearest}"):
        architecture(ModelConfig(variant="ViT-W64/4@16px", image_size=size))


def test_an_unknown_variant_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'ViT-B32'.*'ViT-B/32'"):
        architecture(ModelConfig(variant="ViT-B32"))
    with pytest.raises(UserError, match=r"there are: .*ViT-B/16.*ViT-L/14@336px"):
        architecture(ModelConfig(variant="?"))


def test_heads_must_divide_the_width_and_a_context_must_have_room():
    with pytest.raises(UserError, match=r"width=64 .*num_heads=3"):
        TextTower(context_length=16, vocab_size=9, width=64, depth=1, num_heads=3, mlp_dim=64)
    with pytest.raises(UserError, match="context_length=2"):
        architecture(ModelConfig(context_length=2))
