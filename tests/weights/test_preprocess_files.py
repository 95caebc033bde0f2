"""Configs of preprocessing: what is read does what the family's own reader of the same config does, and what cannot be
done is refused with all its causes."""

import dataclasses
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from oracles import open_clip, require, transformers
from pictures import compose, drawn
from PIL import Image

from clip_jax.architecture import INTERPOLATIONS, RESIZES, Preprocess
from clip_jax.data.transforms import evaluation_crop
from clip_jax.errors import UserError
from clip_jax.models.clip import normalise_pixels
from clip_jax.models.variants import CLIPA_PREPROCESS, SIGLIP_PREPROCESS, VARIANTS
from clip_jax.weights.preprocess_files import from_huggingface, from_open_clip, to_huggingface, to_open_clip

SIZE = 24
OPENAI = {"image_mean": list(Preprocess.mean), "image_std": list(Preprocess.std)}


@pytest.fixture(autouse=True)
def _hushed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PIL says of palettes, once the oracles convert them
        yield


def images() -> list[Image.Image]:
    return [drawn(mode, *shape) for mode in ("RGB", "RGBA", "P + index") for shape in ((53, 37), (30, 47))]


def ours(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    return np.asarray(normalise_pixels(evaluation_crop(image, SIZE, preprocess)[None], preprocess)[0])


# --- OpenCLIP ---

OPEN_CLIP = {
    "nothing": {},
    "SigLIP": {
        **{"size": [SIZE, SIZE], "mode": "RGB", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        **{"interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0},
    },
    "CLIPA": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear"},
    "longest": {"resize_mode": "longest", "fill_color": 255},
    "one number for three, random": {"mean": 0.5, "std": 0.25, "interpolation": "random"},
    "null": {"mean": None, "std": None, "interpolation": None, "resize_mode": None, "fill_color": None, "size": None},
    "what theirs takes for nothing": {"mean": 0, "interpolation": "", "resize_mode": ""},
    "what theirs does not read": {"url": "https://…", "hf_hub": "timm/", "quick_gelu": True},
}


def open_clips(image: Image.Image, config: dict[str, Any]) -> np.ndarray:
    """Returns what OpenCLIP makes of an image with this preprocess_cfg, for a model of this size."""
    package = open_clip().transform
    merged = package.merge_preprocess_dict(package.PreprocessCfg(), config) | {"size": (SIZE, SIZE)}
    transform = package.image_transform_v2(package.PreprocessCfg(**merged), is_train=False)
    return compose(transform.transforms, image).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("config", OPEN_CLIP.values(), ids=OPEN_CLIP)
def test_an_open_clip_config_is_read_as_open_clip_reads_it(config):
    for image in images():
        np.testing.assert_allclose(ours(image, from_open_clip(config)), open_clips(image, config), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", RESIZES)
def test_what_is_written_for_open_clip_is_complete_json_and_read_back(resize):
    for interpolation, fill in itertools.product(INTERPOLATIONS, (0, 9)):
        preprocess = dataclasses.replace(SIGLIP_PREPROCESS, resize=resize, interpolation=interpolation, fill=fill)
        written = json.loads(json.dumps(to_open_clip(preprocess)))
        assert from_open_clip(written) == preprocess
        fields = {field.name for field in dataclasses.fields(open_clip().transform.PreprocessCfg)}
        assert written.keys() == fields - {"size"}
        for image in images():
            np.testing.assert_allclose(ours(image, preprocess), open_clips(image, written), rtol=0, atol=1e-6)


def test_every_named_preprocessing_is_written_for_open_clip_and_read_back():
    for preprocess in {arch.preprocess for arch in VARIANTS.values()} | {SIGLIP_PREPROCESS, CLIPA_PREPROCESS}:
        assert from_open_clip(to_open_clip(preprocess)) == preprocess


def test_all_that_open_clip_does_not_know_is_named():
    config = {"mode": "L", "mean": [0.5, 0.5], "std": "wide", "interpolation": "lanczos", "resize_mode": ["a"]}
    with pytest.raises(UserError) as error:
        from_open_clip(config | {"fill_color": 256})
    assert str(error.value) == (
        "preprocess_cfg: mode='L' is not one of RGB; mean=[0.5, 0.5] should be three numbers, red, green and blue; "
        "std='wide' should be three numbers, red, green and blue; resize_mode=['a'] is not one of shortest, squash, "
        "longest; interpolation='lanczos' is not one of bicubic, bilinear, random; fill_color=256 should be 0 to 255"
    )


# --- Hugging Face ---

HUGGING_FACE = {
    "CLIP as first written": {
        **{"crop_size": SIZE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3},
        **{"feature_extractor_type": "CLIPFeatureExtractor", "size": SIZE},
        **OPENAI,
    },
    "CLIP as written now": {
        **{"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": SIZE}, "do_convert_rgb": True},
        **{"crop_size": {"height": SIZE, "width": SIZE}, "do_rescale": True, "rescale_factor": 0.00392156862745098},
        **{"data_format": "channels_first", "device": None, "do_pad": None, "processor_class": "CLIPProcessor"},
    },
    "CLIP without its class": {"size": SIZE, "crop_size": SIZE, "resample": 2},
    "CLIP, squashed": {
        **{"image_processor_type": "CLIPImageProcessor", "size": {"height": SIZE, "width": SIZE}},
        **{"do_center_crop": False, "image_mean": 0.5, "image_std": [0.2, 0.3, 0.4]},
    },
    "CLIP, squashed and cropped": {"size": [SIZE, SIZE], "crop_size": [SIZE, SIZE]},
    "CLIP, a number for both sides": {"size": SIZE, "default_to_square": True, "do_center_crop": False},
    "SigLIP": {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIZE, "width": SIZE}, "resample": 2},
    "SigLIP, cropped": {
        **{"image_processor_type": "SiglipImageProcessor", "size": {"shortest_edge": SIZE}, "do_center_crop": True},
        **{"crop_size": {"height": SIZE, "width": SIZE}},
    },
    "null, of CLIP's class": {
        **{"image_processor_type": "CLIPImageProcessor", "size": [SIZE, SIZE], "crop_size": None, "do_pad": None},
        **{"do_center_crop": None, "default_to_square": None},
    },
}


def hugging_faces(image: Image.Image, config: dict[str, Any]) -> np.ndarray:
    """Returns what Hugging Face's processor on PIL makes of an image with this preprocessor_config.json."""
    transformers()
    found = require("transformers.models.auto.image_processing_auto")
    name = config.get("image_processor_type", "CLIPImageProcessor").removesuffix("Fast")
    processor = found.get_image_processor_class_from_name(name + "Pil").from_dict(config)
    return np.moveaxis(processor(image).pixel_values[0], 0, -1)


@pytest.mark.parametrize("config", HUGGING_FACE.values(), ids=HUGGING_FACE)
def test_a_hugging_face_config_is_read_as_hugging_face_reads_it(config):
    preprocess = from_huggingface(config, SIZE)
    for image in images():
        np.testing.assert_allclose(ours(image, preprocess), hugging_faces(image, config), rtol=0, atol=1e-6)


def test_an_image_that_their_config_lets_fail_because_it_is_not_rgb_is_made_rgb_as_others_are():
    config = {"size": SIZE, "crop_size": SIZE}
    for do_convert_rgb in (False, None):
        said = config | {"do_convert_rgb": do_convert_rgb}
        assert from_huggingface(said, SIZE) == from_huggingface(config, SIZE)
        np.testing.assert_array_equal(hugging_faces(images()[0], said), hugging_faces(images()[0], config))
        for image in images()[2:]:
            with pytest.raises(ValueError, match="mean must have"):
                hugging_faces(image, said)


@pytest.mark.parametrize("field", ["do_resize", "do_rescale", "rescale_factor", "resample", "size", "image_mean"])
def test_null_in_a_hugging_face_config_is_no_default(field):
    config = {"size": SIZE, "crop_size": SIZE}
    with pytest.raises(UserError, match=f"{field}=None"):
        from_huggingface(config | {field: None}, SIZE)
    try:
        pixels = hugging_faces(images()[0], config | {field: None})
    except (ValueError, TypeError, AttributeError):
        return  # theirs does not take it either
    assert (pixels != hugging_faces(images()[0], config)).any()


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "SiglipImageProcessor"])
def test_what_a_config_does_not_say_is_its_classs_own(name):
    transformers()
    module = {"CLIPImageProcessor": "clip", "SiglipImageProcessor": "siglip"}[name]
    theirs = getattr(require(f"transformers.models.{module}.image_processing_pil_{module}"), name + "Pil")()
    assert from_huggingface({"image_processor_type": name}, 224) == from_huggingface(theirs.to_dict(), 224)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_what_is_written_for_hugging_face_is_complete_json_and_read_back(resize, interpolation):
    theirs = {"rgb_first": True, "crop_floor": True}
    preprocess = dataclasses.replace(CLIPA_PREPROCESS, resize=resize, interpolation=interpolation, **theirs)
    written = json.loads(json.dumps(to_huggingface(preprocess, SIZE)))
    assert from_huggingface(written, SIZE) == preprocess
    for name in ("CLIPImageProcessor", "SiglipImageProcessor"):  # whichever reads it
        config = written | {"image_processor_type": name}
        assert from_huggingface(config, SIZE) == preprocess
        for image in images():
            np.testing.assert_allclose(ours(image, preprocess), hugging_faces(image, config), rtol=0, atol=1e-6)


def test_of_one_family_written_for_the_other_only_the_order_and_the_rounding_change():
    for preprocess in (Preprocess(), SIGLIP_PREPROCESS, CLIPA_PREPROCESS):
        there = from_huggingface(to_huggingface(preprocess, SIZE), SIZE)
        assert there == dataclasses.replace(preprocess, rgb_first=True, crop_floor=True)
        assert from_open_clip(to_open_clip(there)) == preprocess


def test_a_way_to_resize_that_hugging_face_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"preprocess.resize='longest': .* know shortest and squash only; choose ano"):
        to_huggingface(Preprocess(resize="longest"), SIZE)


def test_all_that_is_not_supported_in_a_hugging_face_config_is_named():
    config = {"do_resize": False, "do_normalize": False, "do_pad": True, "rescale_factor": 1, "resample": 1}
    with pytest.raises(UserError) as error:
        from_huggingface(config | {"image_mean": [0.5], "image_std": {"red": 1}, "size": 256}, 224)
    assert str(error.value) == (
        "the config of the image processor (CLIPImageProcessor): do_resize=False should be True; do_normalize=False "
        "should be True; do_pad=True should be False; rescale_factor=1 should be 1/255; image_mean=[0.5] should be "
        "three numbers, red, green and blue; image_std={'red': 1} should be three numbers, red, green and blue; "
        "size=256, do_center_crop=True, crop_size=224: not the model's image_size=224; resample=1 is not one of 2, 3"
    )


SIZES = {
    "a crop of another size": ({"crop_size": 256}, "not the model's image_size=224"),
    "no square": ({"size": {"height": 224, "width": 256}}, "not the model's image_size=224"),
    "a crop that is no square": ({"crop_size": {"height": 224, "width": 256}}, "not the model's image_size=224"),
    "the shortest edge, not cropped": ({"do_center_crop": False}, "should be resized to a square"),
    "the longest edge": ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "should be resized to a square"),
    "a crop by its edge": ({"crop_size": {"shortest_edge": 224}}, "should be resized to a square"),
    "no size": ({"size": "large"}, "not the model's image_size=224"),
    "three sides": ({"size": [224, 224, 3]}, "not the model's image_size=224"),
}


@pytest.mark.parametrize(("config", "message"), SIZES.values(), ids=SIZES)
def test_a_size_that_is_not_the_models_square_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        from_huggingface(config, 224)


@pytest.mark.parametrize("name", ["Siglip2ImageProcessor", "ViTImageProcessor", 7, ["CLIPImageProcessor"]])
def test_another_class_is_named_with_those_that_are_supported(name):
    message = f"image_processor_type={name!r} is not supported; there are: CLIPImageProcessor, SiglipImageProcessor"
    with pytest.raises(UserError, match=re.escape(message)):
        from_huggingface({"image_processor_type": name}, 224)
