"""The table of architectures: OpenAI's parameter counts, every name's shapes, and what is said of bad sizes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from clip_jax import architecture as architecture_module
from clip_jax.architecture import LARGEST_DEPTH, LARGEST_SIZE, Architecture, ResNetTower, TextTower, ViTTower
from clip_jax.config import ModelConfig
from clip_jax.data import transforms
from clip_jax.errors import UserError
from clip_jax.models import layers, vit
from clip_jax.models import text as text_tower
from clip_jax.models.clip import CLIP, Definition
from clip_jax.models.variants import VARIANTS, architecture


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("RN50", 102_007_137),
        ("RN101", 119_688_033),
        ("RN50x4", 178_300_601),
        ("RN50x16", 290_979_217),
        ("RN50x64", 623_258_305),
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


VIT, RESNET = VARIANTS["ViT-B/32"], VARIANTS["RN50"]


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        (VIT.image, {"patch_size": 0}, "patch_size=0 should be 1 to"),
        (VIT.image, {"patch_size": -32}, "patch_size=-32 should be 1 to"),
        (VIT.image, {"mlp_dim": 0}, "mlp_dim=0 should be 1 to"),
        (VIT.image, {"width": 0}, "image tower's width=0 should be 1 to"),
        (VIT.image, {"width": -12}, "width=-12 should be 1 to"),
        (VIT.image, {"width": 12 * 2**70}, f"width={12 * 2**70} should be 1 to 1048576"),
        (VIT.image, {"depth": 0}, "image tower's depth=0 should be 1 to 256"),
        (VIT.image, {"depth": 10**9}, "depth=1000000000 should be 1 to 256"),
        (VIT.image, {"num_heads": 0}, "num_heads=0"),
        (VIT.image, {"image_size": 2**40}, f"image_size={2**40} should be 1 to"),
        (VIT.image, {"image_size": 2**20}, f"num_patches={2**30} should be 1 to"),
        (RESNET.image, {"width": 0}, "width=0 should be 1 to"),
        (RESNET.image, {"width": 1}, "width=1 is odd"),
        (RESNET.image, {"width": -64}, "width=-64 should be 1 to"),
        (RESNET.image, {"width": 65}, "width=65 is odd"),
        (RESNET.image, {"width": 2**70}, f"width={2**70} should be 1 to"),
        (RESNET.image, {"image_size": 2**40}, f"image_size={2**40} should be 1 to"),
        (RESNET.image, {"depths": (1, 2, 1, 100_000)}, r"depths=\(1, 2, 1, 100000\): every stage .* 1 to 256"),
        (RESNET.image, {"depths": (1, 2, 0, 1)}, r"depths=\(1, 2, 0, 1\): every stage .* 1 to 256"),
        (RESNET.image, {"num_heads": 0}, "num_heads=0"),
        (VIT.text, {"vocab_size": 0}, "vocab_size=0 should be 1 to"),
        (VIT.text, {"context_length": 2**40}, f"context_length={2**40} should be 1 to"),
        (VIT.text, {"mlp_dim": -1}, "text tower's mlp_dim=-1 should be 1 to"),
        (VIT.text, {"depth": -1}, "text tower's depth=-1 should be 1 to"),
        (VIT.text, {"width": 0}, "text tower's width=0 should be 1 to"),
        (VIT, {"embed_dim": 0}, "embed_dim=0 should be 1 to"),
        (VIT, {"embed_dim": 2**70}, f"embed_dim={2**70} should be 1 to"),
        (VIT.preprocess, {"mean": (0.5, math.nan, 0.5)}, "preprocess.mean=.*nan.* finite"),
        (VIT.preprocess, {"std": (0.5, math.inf, 0.5)}, "preprocess.std=.*inf.* finite"),
        (VIT.preprocess, {"std": (0.5, 0.0, 0.5)}, "preprocess.std=.*0.0.* positive"),
    ],
)
def test_a_size_that_no_model_has_is_refused_before_anything_is_built(part, changes, words):
    with pytest.raises(UserError, match=words) as error:
        dataclasses.replace(part, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "image",
    [
        ViTTower(LARGEST_SIZE, 1024, LARGEST_SIZE, LARGEST_DEPTH, LARGEST_SIZE, LARGEST_SIZE),
        ResNetTower(32 * 1024, LARGEST_SIZE, (LARGEST_DEPTH,) * 4, 32),
    ],
    ids=["ViT", "RN"],
)
def test_the_largest_sizes_have_shapes(image):
    text = TextTower(LARGEST_SIZE, LARGEST_SIZE, LARGEST_SIZE, LARGEST_DEPTH, LARGEST_SIZE, LARGEST_SIZE)
    assert Definition(Architecture(LARGEST_SIZE, image, text)).shapes()


@pytest.mark.parametrize(
    ("words", "table"),
    [
        (architecture_module.ACTIVATIONS, layers.ACTIVATIONS),
        (architecture_module.IMAGE_POOLS, vit.POOLS),
        (architecture_module.TEXT_POOLS, text_tower.POOLS),
        (architecture_module.RESIZES, transforms.RESIZED),
        (architecture_module.INTERPOLATIONS, transforms.RESAMPLING),
    ],
    ids=["activations", "image pools", "text pools", "resizes", "interpolations"],
)
def test_what_has_a_word_has_code_and_the_other_way_round(words, table):
    assert set(words) == set(table)
