"""Position embeddings of another size: each family's own resize is the oracle, in float32 as it runs and in float64."""

import dataclasses
import logging
import warnings

import ml_dtypes
import numpy as np
import pytest
from oracles import open_clip, require, timm, transformers

from clip_jax.architecture import Architecture, ResNetTower
from clip_jax.errors import UserError
from clip_jax.models.variants import VARIANTS
from clip_jax.weights import resize as module
from clip_jax.weights.bundle import Bundle, variant_of
from clip_jax.weights.resize import TEXT_POSITIONS, image_positions, resize

WIDTH = 16
STD = 0.02  # of positions, where a model's are drawn or learnt
PATCH = 4
GRIDS = [(4, 7), (7, 4), (7, 16), (24, 7), (27, 24), (24, 27), (5, 10), (10, 5), (1, 3), (3, 1), (2, 9)]
LENGTHS = [(16, 77), (77, 16), (77, 64), (77, 78), (64, 248), (3, 10), (77, 76)]
CLASS_TOKEN = VARIANTS["ViT-W64/4@16px"]
NO_CLASS_TOKEN = dataclasses.replace(
    CLASS_TOKEN,
    image=dataclasses.replace(CLASS_TOKEN.image, class_token=False, pool="map", projection=False),
)
RESNET = dataclasses.replace(CLASS_TOKEN, image=ResNetTower(64, 4, (1, 1, 1, 1), 2))


def some_bundle(
    base: Architecture, *, grid: int = 4, length: int = 16, dtype: type = np.float32, kernel: str = "bicubic_antialias"
) -> Bundle:
    """Returns a bundle with positions of a grid and a length, in float64 of another size than trained ones, and one
    array that has nothing to do with them."""
    scale = 1 if dtype == np.float64 else STD
    step = ResNetTower.STRIDE if base is RESNET else PATCH
    arch = dataclasses.replace(
        base,
        image=dataclasses.replace(base.image, image_size=step * grid),
        text=dataclasses.replace(base.text, context_length=length),
    )
    rng = np.random.default_rng([grid, length])
    positions = grid**2 + (base is not NO_CLASS_TOKEN)
    arrays = {
        "logit_scale": np.array(4.6, np.float32),
        image_positions(arch.image): (scale * rng.normal(size=(positions, WIDTH))).astype(dtype),
        TEXT_POSITIONS: (scale * rng.normal(size=(length, WIDTH))).astype(dtype),
    }
    return Bundle(arch, arrays, variant_of(arch, "mine"), "a test", resize_kernel=kernel)


def resized_image(bundle: Bundle, grid: int) -> np.ndarray:
    """Returns the image positions, once the model is for a grid of that many positions a side."""
    step = ResNetTower.STRIDE if isinstance(bundle.architecture.image, ResNetTower) else PATCH
    found = resize(bundle, image_size=step * grid)
    assert found.architecture.image.image_size == step * grid
    return found.arrays[image_positions(found.architecture.image)]


def assert_close(found: np.ndarray, theirs: np.ndarray) -> None:
    """Asserts 1e-6, and rounding alone where they compute in float64 too.

    In float32 they misplace a sample by up to 77 × 2⁻²⁴ of the way to the next position, which is noise here: 5e-6 of
    what the two differ by. So 1e-6 is for positions as large as models have them.
    """
    assert found.shape == theirs.shape
    assert found.dtype == theirs.dtype
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-6 if theirs.dtype == np.float32 else 1e-13)


# --- against the families ---


def open_clip_model(grid: int, length: int = 8):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_clip().model.CLIP(
            embed_dim=WIDTH,
            vision_cfg={"layers": 1, "width": WIDTH, "head_width": 8, "patch_size": PATCH, "image_size": PATCH * grid},
            text_cfg={"context_length": length, "vocab_size": 10, "width": WIDTH, "heads": 2, "layers": 1},
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_image_positions_are_those_of_open_clip(dtype):
    torch, package = require("torch"), open_clip()
    for old, new in GRIDS:
        bundle = some_bundle(CLASS_TOKEN, grid=old, dtype=dtype)
        state = {"visual.positional_embedding": torch.from_numpy(bundle.arrays["image/positional_embedding"])}
        package.model.resize_pos_embed(state, open_clip_model(new))
        assert_close(resized_image(bundle, new), state["visual.positional_embedding"].numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_text_positions_are_those_of_open_clip(dtype):
    torch, package = require("torch"), open_clip()
    for old, new in LENGTHS:
        bundle = some_bundle(CLASS_TOKEN, length=old, dtype=dtype)
        state = {"positional_embedding": torch.from_numpy(bundle.arrays[TEXT_POSITIONS])}
        package.model.resize_text_pos_embed(state, open_clip_model(4, new))
        found = resize(bundle, context_length=new)
        assert found.architecture.text.context_length == new
        assert_close(found.arrays[TEXT_POSITIONS], state["positional_embedding"].numpy())


@pytest.mark.parametrize("base", [CLASS_TOKEN, NO_CLASS_TOKEN], ids=["class token", "no class token"])
def test_image_positions_are_those_of_a_timm_tower_told_its_input_size(base):
    torch = require("torch")
    timm()
    tower = require("timm.models.vision_transformer").VisionTransformer
    logging.getLogger("timm").setLevel(logging.ERROR)  # it tells of every resize
    for old, new in GRIDS:
        bundle = some_bundle(base, grid=old)
        size = {"img_size": PATCH * old, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 1, "num_heads": 2}
        kind = {"class_token": base is CLASS_TOKEN, "global_pool": "token" if base is CLASS_TOKEN else "map"}
        theirs = tower(**size, **kind, num_classes=0)
        theirs.pos_embed.data = torch.from_numpy(bundle.arrays["image/positional_embedding"])[None]
        theirs.set_input_size(img_size=(PATCH * new, PATCH * new))
        assert_close(resized_image(bundle, new), theirs.pos_embed.detach()[0].numpy())


def test_positions_of_a_resnets_attention_pool_are_those_of_timms():
    """OpenCLIP does not resize them; timm does, in its port of the same module, at each call."""
    torch = require("torch")
    timm()
    pool = require("timm.layers").AttentionPool2d
    for old, new in [(2, 3), (7, 9), (9, 7), (7, 14)]:
        bundle = some_bundle(RESNET, grid=old)
        theirs, ours = (pool(WIDTH, feat_size=size, num_heads=2) for size in (old, new))
        ours.load_state_dict(theirs.state_dict() | {"pos_embed": torch.from_numpy(resized_image(bundle, new))})
        theirs.pos_embed.data = torch.from_numpy(bundle.arrays["image/attention_pool/positional_embedding"])
        x = torch.randn(2, WIDTH, new, new, generator=torch.Generator().manual_seed(0))
        found, expected = (pool.double()(x.double()).detach().numpy() for pool in (ours, theirs))
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_image_positions_are_those_of_hugging_face(name, dtype):
    torch = require("torch")
    transformers()
    package = require(f"transformers.models.{name.lower()}")
    embeddings = getattr(
        require(f"transformers.models.{name.lower()}.modeling_{name.lower()}"), name + "VisionEmbeddings"
    )
    for old, new in GRIDS:
        bundle = some_bundle(CLASS_TOKEN if name == "CLIP" else NO_CLASS_TOKEN, grid=old, dtype=dtype, kernel="bicubic")
        size = PATCH * new
        config = getattr(package, name + "VisionConfig")(
            hidden_size=WIDTH, image_size=PATCH * old, patch_size=PATCH, num_attention_heads=2
        )
        theirs = embeddings(config)
        theirs.position_embedding.weight.data = torch.from_numpy(bundle.arrays["image/positional_embedding"])
        tokens = torch.zeros(1, new**2 + (name == "CLIP"), WIDTH)
        expected = theirs.interpolate_pos_encoding(tokens, size, size)[0].detach().numpy()
        assert_close(resized_image(bundle, new), expected)


# --- what stays, and what is refused ---


@pytest.mark.parametrize("base", [CLASS_TOKEN, NO_CLASS_TOKEN, RESNET], ids=["class token", "no class token", "ResNet"])
@pytest.mark.parametrize("kernel", module.KERNELS)
def test_the_same_size_leaves_every_bit(base, kernel):
    bundle = some_bundle(base, kernel=kernel)
    size, length = bundle.architecture.image.image_size, bundle.architecture.text.context_length
    for found in (resize(bundle), resize(bundle, size, length)):
        assert found.architecture == bundle.architecture
        assert found.arrays.keys() == bundle.arrays.keys()
        assert all(found.arrays[path] is x for path, x in bundle.arrays.items())
    for old_and_new in (3, 8):
        for matrix in (*module.KERNELS.values(), module.linear):
            np.testing.assert_array_equal(matrix(old_and_new, old_and_new), np.eye(old_and_new))


def test_a_size_with_the_same_grid_leaves_every_bit():
    siglip = VARIANTS["ViT-SO400M-14-SigLIP-384"]  # sees 378 of 384 pixels
    bundle = Bundle(siglip, {"image/positional_embedding": np.zeros((27**2, 2), np.float32)}, "", "a test")
    found = resize(bundle, image_size=378)
    assert found.arrays["image/positional_embedding"] is bundle.arrays["image/positional_embedding"]
    assert found.variant == "ViT-SO400M-14-SigLIP-378"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_result_is_rounded_once_to_the_dtype_of_its_array(dtype):
    bundle = some_bundle(CLASS_TOKEN, dtype=dtype)
    wide = dataclasses.replace(bundle, arrays={path: x.astype(np.float64) for path, x in bundle.arrays.items()})
    found, exact = (resize(one, 4 * 9, 40).arrays for one in (bundle, wide))
    for path in ("image/positional_embedding", TEXT_POSITIONS):
        assert found[path].dtype == dtype
        np.testing.assert_array_equal(found[path], exact[path].astype(dtype))


def test_the_class_token_and_all_other_arrays_stay():
    bundle = some_bundle(CLASS_TOKEN)
    found = resize(bundle, image_size=36)
    assert found.arrays["logit_scale"] is bundle.arrays["logit_scale"]
    assert found.arrays[TEXT_POSITIONS] is bundle.arrays[TEXT_POSITIONS]
    first, old = (one.arrays["image/positional_embedding"][0] for one in (found, bundle))
    np.testing.assert_array_equal(first, old)


def test_a_resized_model_is_named_after_the_table_where_it_is_in_it():
    vit = VARIANTS["ViT-L/14"]
    positions = {"image/positional_embedding": np.zeros((257, 2), np.float32)}
    assert resize(Bundle(vit, positions, "ViT-L/14", "a test"), 336).variant == "ViT-L/14@336px"
    assert resize(Bundle(vit, positions, "ViT-L/14", "a test"), 252).variant == "ViT-L/14"


def test_sizes_that_do_not_fit_are_all_named():
    with pytest.raises(UserError, match=r"image_size=30 is not a multiple of patch_size=4.*; context_length=2 has no"):
        resize(some_bundle(CLASS_TOKEN), 30, 2)
    with pytest.raises(UserError, match=r"image_size=100 is not a multiple of 32, the stride of a ResNet"):
        resize(some_bundle(RESNET), 100)
