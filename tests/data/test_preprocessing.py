"""Pixels: `evaluation_crop` is OpenAI's preprocessing, over every mode of PIL's, real files and extreme shapes.

21 modes × 12 shapes and 38 kinds of file × 3 shapes make 366 images, each brought to two of five sizes. The lines of
1 × 3000 and the images enlarged in strips come on top.
"""

import contextlib
import io
import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import openai_clip
from pictures import KINDS, MODES, SHAPES, compose, drawn, encoded
from PIL import Image, ImageOps

from clip_jax.architecture import Preprocess
from clip_jax.data import transforms
from clip_jax.errors import UserError
from clip_jax.models.clip import normalise_pixels

OPENAI = Preprocess()


@contextlib.contextmanager
def original(size: int):
    """Gives OpenAI's transform in two parts, up to the conversion to RGB and from there, and hushes what it says."""
    *to_rgb, to_tensor, normalise = openai_clip().clip._transform(size).transforms
    assert [type(step).__name__ for step in (*to_rgb, to_tensor, normalise)] == [
        *("Resize", "CenterCrop", "function", "ToTensor", "Normalize")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda image: compose(to_rgb, image), lambda image: compose((to_tensor, normalise), image)


def assert_original(image: Image.Image, size: int, ours: Image.Image | None = None) -> None:
    """Asserts equal pixels in uint8, and as the tower gets them within 1e-6, four units of float32's last place."""
    pixels_HWC = transforms.evaluation_crop(image if ours is None else ours, size, OPENAI)
    what = f"{image.mode} of {image.width} × {image.height} to {size}"
    with original(size) as (to_rgb, to_float):
        rgb = to_rgb(image)
        assert rgb.mode == "RGB"
        np.testing.assert_array_equal(pixels_HWC, np.asarray(rgb), err_msg=what)
        if size > 100:  # for time: from RGB on each value is treated for itself, and one test has them all
            return
        floats_HWC = to_float(rgb).permute(1, 2, 0).numpy()
    found_HWC = normalise_pixels(jnp.asarray(pixels_HWC)[None], OPENAI)[0]
    np.testing.assert_allclose(found_HWC, floats_HWC, rtol=0, atol=1e-6, err_msg=what)


# --- in memory ---


@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_any_mode_gives_the_originals_pixels(mode):
    for (width, height), sizes in SHAPES.items():
        image = drawn(mode, width, height)
        assert image.mode == mode.split()[0]
        for size in sizes:
            assert_original(image, size)


def test_each_level_of_each_colour_is_normalised_as_the_original_does():
    levels_HW = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert_original(Image.fromarray(np.stack([levels_HW, levels_HW.T, levels_HW[::-1]], axis=-1)), 16)


@pytest.mark.parametrize(("width", "height"), [(1, 3000), (3000, 1)])
def test_a_line_gives_the_originals_pixels(width, height):
    for mode in MODES:
        assert_original(drawn(mode, width, height), 16)
    for mode in ("LA", "P"):
        assert_original(drawn(mode, width, height), 40)
    assert_original(drawn("RGB", width, height), 224)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_enlarged_in_strips_is_the_one_enlarged_whole(mode, monkeypatch):
    for (width, height), size in itertools.product([(3, 41), (41, 3), (12, 19), (18, 11), (1, 7), (13, 13)], (21, 50)):
        image = drawn(mode, width, height)
        with original(size) as (to_rgb, _):
            whole = np.asarray(to_rgb(image))
        for pixels in (1, 1500, 5000):
            monkeypatch.setattr(transforms, "STRIP_PIXELS", pixels)
            np.testing.assert_array_equal(transforms.evaluation_crop(image, size, OPENAI), whole)


def test_the_image_given_is_left_as_it_was():
    for mode, size in itertools.product(MODES, (16, 20, 40)):
        image = drawn(mode, 20, 30)
        content, info = image.tobytes(), dict(image.info)
        transforms.evaluation_crop(image, size, OPENAI)
        assert (image.mode, image.size, image.tobytes(), image.info) == (mode.split()[0], (20, 30), content, info)


# --- in files ---


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_file_gives_the_originals_pixels(kind):
    for (width, height), sizes in {(301, 230): (224, 40), (40, 97): (40, 16), (33, 21): (288, 16)}.items():
        data = encoded(kind, width, height)
        for size in sizes:
            assert_original(Image.open(io.BytesIO(data)), size, transforms.decode(data))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_file_is_of_the_kind_that_its_name_says(kind):
    image = Image.open(io.BytesIO(encoded(kind, 30, 20)))
    assert (image.format, image.mode) == (kind.format, kind.drawn.split()[0])
    assert getattr(image, "n_frames", 1) == kind.frames
    assert image.getexif().get(0x0112, 1) == kind.orientation
    assert ("transparency" in image.info) == (" + " in kind.drawn or "transparency" in kind.options)


def test_an_orientation_is_left_alone_as_the_original_does():
    image = transforms.decode(encoded(KINDS["JPEG, EXIF orientation 6"], 40, 40))
    upright = transforms.evaluation_crop(ImageOps.exif_transpose(image), 40, OPENAI)
    assert (transforms.evaluation_crop(image, 40, OPENAI) != upright).any()


# --- what cannot be prepared ---


def test_a_mode_that_the_original_cannot_convert_is_named():
    for size in (16, 20, 40):
        with pytest.raises(UserError, match=r"mode 'La' cannot be prepared: .*; convert it to RGB"):
            transforms.evaluation_crop(drawn("La", 20, 30), size, OPENAI)
        with original(size) as (to_rgb, _), pytest.raises(ValueError, match="La"):
            to_rgb(drawn("La", 20, 30))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_refused_as_the_original_does(shape):
    image = Image.new("RGB", shape)
    with pytest.raises(UserError, match=f"{shape[0]} × {shape[1]} pixels cannot be prepared"):
        transforms.evaluation_crop(image, 16, OPENAI)
    with original(16) as (to_rgb, _), pytest.raises(ZeroDivisionError):
        to_rgb(image)


def test_the_narrowest_image_of_a_jpeg_is_the_narrowest_allowed():
    assert_original(drawn("RGB", 1, 65_535), 8)
    assert_original(drawn("RGB", 65_535, 1), 8)
    for shape in [(1, 65_536), (65_536, 1)]:
        with pytest.raises(UserError, match=r"sides must be within 1 : 65535"):
            transforms.evaluation_crop(Image.new("1", shape), 8, OPENAI)
