"""Pixels: `evaluation_crop` is each family's own preprocessing, on the 366 images that OpenAI's is proven on.

Equal in uint8: OpenCLIP's transform, and Hugging Face's processors on PIL. Hugging Face's other backend, torchvision,
differs by one level here and there, rarely two, because it has 16 bits for a kernel's weight and PIL 22. By more it
differs where PIL goes down before it goes across, as PIL does now where that is cheaper: each pass rounds and clips
what it gives, so at an edge from black to white, of which these images are full, the order shows.
"""

import dataclasses
import io
import warnings
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
from in_memory import InMemory
from oracles import open_clip, require, transformers
from pictures import KINDS, MODES, SHAPES, compose, drawn, encoded
from PIL import Image

from clip_jax.api import ImagePreprocess
from clip_jax.architecture import INTERPOLATIONS, RESIZES, Preprocess
from clip_jax.data import transforms
from clip_jax.data.pipeline import evaluation_batches
from clip_jax.data.sources import Record
from clip_jax.errors import UserError
from clip_jax.models.clip import normalise_pixels
from clip_jax.models.variants import VARIANTS

RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers, in Hugging Face's configs
FILE_SHAPES = {(301, 230): (224, 40), (40, 97): (40, 16), (33, 21): (288, 16)}


@lru_cache(maxsize=1)
def images() -> list[tuple[str, Image.Image, tuple[int, int]]]:
    """Returns name, image, and the sizes it is brought to, of each of the 366."""
    in_memory = [
        (f"{mode} of {shape}", drawn(mode, *shape), sizes) for mode in MODES for shape, sizes in SHAPES.items()
    ]
    in_files = [
        (f"{name} of {shape}", Image.open(io.BytesIO(encoded(kind, *shape))), sizes)
        for name, kind in KINDS.items()
        for shape, sizes in FILE_SHAPES.items()
    ]
    return in_memory + in_files


def test_there_are_366_images():
    assert len(images()) == 366


def each(turn: int = 0) -> Iterator[tuple[str, Image.Image, int]]:
    """Yields each image with one of its sizes, and in the other turn with the other."""
    for i, (name, image, sizes) in enumerate(images()):
        size = sizes[(i + turn) % 2]
        yield f"{name} to {size}", image, size


@pytest.fixture(autouse=True)
def _hushed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PIL says of palettes, once the oracles convert them
        yield


def open_clips(image: Image.Image, size: int, preprocess: Preprocess) -> np.ndarray:
    """Returns the pixels of OpenCLIP's own transform, before they become floats."""
    words = {"resize_mode": preprocess.resize, "interpolation": preprocess.interpolation}
    transform = open_clip().transform.image_transform(size, is_train=False, fill_color=preprocess.fill, **words)
    *to_rgb, _, _ = transform.transforms
    return np.asarray(compose(to_rgb, image))


def hugging_faces(image: Image.Image, size: int, preprocess: Preprocess, backend: str = "Pil") -> np.ndarray:
    """Returns the pixels of Hugging Face's own processor, which leaves them uint8 when told to do no more."""
    transformers()
    name = {"shortest": "CLIP", "squash": "Siglip"}[preprocess.resize]
    module = f"image_processing_{'pil_' if backend else ''}{name.lower()}"
    processor = getattr(require(f"transformers.models.{name.lower()}.{module}"), f"{name}ImageProcessor{backend}")
    square = {"height": size, "width": size}
    sizes = {"size": {"shortest_edge": size}, "crop_size": square} if name == "CLIP" else {"size": square}
    steps = {"do_rescale": False, "do_normalize": False, "resample": RESAMPLE[preprocess.interpolation]}
    (pixels_CHW,) = processor(**sizes, **steps)(image).pixel_values
    return np.moveaxis(np.asarray(pixels_CHW), 0, -1)


@dataclasses.dataclass(frozen=True)
class OneImage(InMemory):
    """A source of one record."""

    data: bytes

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Record:
        return Record(self.data, ("a picture",), None)


FAMILIES = {
    **{
        f"OpenCLIP, {resize}, {interpolation}": (open_clips, Preprocess(resize=resize, interpolation=interpolation))
        for resize in RESIZES
        for interpolation in INTERPOLATIONS
    },
    "OpenCLIP, longest on grey": (open_clips, Preprocess(resize="longest", fill=127)),
    **{
        f"Hugging Face, {resize}, {word}": (
            hugging_faces,
            Preprocess(resize=resize, interpolation=word, rgb_first=True, crop_floor=True),
        )
        for resize in ("shortest", "squash")
        for word in INTERPOLATIONS
    },
}


@pytest.mark.parametrize(("theirs", "preprocess"), FAMILIES.values(), ids=FAMILIES)
def test_any_image_gives_its_familys_pixels(theirs, preprocess):
    for what, image, size in each(turn=list(FAMILIES.values()).index((theirs, preprocess))):
        found = transforms.evaluation_crop(image, size, preprocess)
        np.testing.assert_array_equal(found, theirs(image, size, preprocess), err_msg=what)


def test_the_families_differ_in_the_pixels_of_images_that_are_not_rgb_and_of_odd_sizes():
    preprocess = {theirs: preprocess for theirs, preprocess in FAMILIES.values() if preprocess.resize == "shortest"}
    counts = {"RGB": 0, "other": 0}
    for what, image, size in each():
        one, other = (transforms.evaluation_crop(image, size, one) for one in preprocess.values())
        counts["RGB" if what.startswith("RGB of") else "other"] += bool((one != other).any())
    assert counts["RGB"] > 0
    assert counts["other"] > 100


@pytest.mark.parametrize(("theirs", "preprocess"), FAMILIES.values(), ids=FAMILIES)
def test_a_line_gives_its_familys_pixels_or_is_refused_where_theirs_raises(theirs, preprocess):
    for mode in ("RGB", "RGBA", "P"):
        for shape in ((1, 3000), (3000, 1)):
            image = drawn(mode, *shape)
            if preprocess.resize == "longest":  # 1/187 of a pixel
                with pytest.raises(UserError, match="with its longer side resized to 16 nothing is left of the other"):
                    transforms.evaluation_crop(image, 16, preprocess)
                with pytest.raises(ValueError, match="must be > 0"):
                    theirs(image, 16, preprocess)
            else:
                found = transforms.evaluation_crop(image, 16, preprocess)
                np.testing.assert_array_equal(found, theirs(image, 16, preprocess))


@pytest.mark.parametrize(("theirs", "preprocess"), FAMILIES.values(), ids=FAMILIES)
def test_a_mode_that_no_family_can_convert_is_named(theirs, preprocess):
    with pytest.raises(UserError, match=r"mode 'La' cannot be prepared: .*; convert it to RGB"):
        transforms.evaluation_crop(drawn("La", 20, 30), 16, preprocess)
    with pytest.raises(ValueError, match="La"):
        theirs(drawn("La", 20, 30), 16, preprocess)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P + bytes"])
@pytest.mark.parametrize("family", ["OpenCLIP, shortest, bilinear", "Hugging Face, shortest, bilinear"])
def test_an_image_enlarged_in_strips_is_the_one_enlarged_whole(family, mode, monkeypatch):
    theirs, preprocess = FAMILIES[family]
    for shape in [(3, 41), (41, 3), (12, 19), (1, 7), (13, 13)]:
        image = drawn(mode, *shape)
        whole = theirs(image, 21, preprocess)
        for pixels in (1, 1500):
            monkeypatch.setattr(transforms, "STRIP_PIXELS", pixels)
            np.testing.assert_array_equal(transforms.evaluation_crop(image, 21, preprocess), whole)


def test_the_image_given_is_left_as_it_was():
    for _, preprocess in FAMILIES.values():
        for mode in MODES:
            image = drawn(mode, 20, 30)
            content, info = image.tobytes(), dict(image.info)
            transforms.evaluation_crop(image, 16, preprocess)
            assert (image.mode, image.size, image.tobytes(), image.info) == (mode.split()[0], (20, 30), content, info)


def test_the_facade_and_evaluation_give_a_model_its_own_pixels():
    preprocess = Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize="squash", rgb_first=True)
    arch = dataclasses.replace(VARIANTS["ViT-W64/4@16px"], preprocess=preprocess)
    data = encoded(KINDS["PNG, RGBA"], 33, 21)
    pixels = transforms.evaluation_crop(transforms.decode(data), 16, preprocess)
    expected = np.asarray(normalise_pixels(pixels[None], preprocess))
    np.testing.assert_array_equal(ImagePreprocess(arch)([transforms.decode(data)]), expected)
    [rows] = evaluation_batches(OneImage(data), image_size=16, preprocess=preprocess, global_batch=1)
    np.testing.assert_array_equal(normalise_pixels(rows.image, preprocess), expected)


# --- Hugging Face on torchvision ---


def across_then_down(image: Image.Image, size: int, preprocess: Preprocess) -> np.ndarray:
    """Returns what `evaluation_crop` would give if PIL always went across first, as torchvision does."""
    image, resample = transforms.on_white(image), transforms.RESAMPLING[preprocess.interpolation]
    width, height = transforms.RESIZED[preprocess.resize](*image.size, size)
    image = image.resize((width, image.height), resample).resize((width, height), resample)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("Hugging Face")])
def test_torchvisions_pixels_are_within_two_levels_but_where_pil_goes_down_first(family):
    _, preprocess = FAMILIES[family]
    rgb = [(what, image, size) for turn in (0, 1) for what, image, size in each(turn) if image.mode == "RGB"]
    assert len(rgb) > 100
    for what, image, size in rgb:
        ours = transforms.evaluation_crop(image, size, preprocess)
        theirs = np.int16(hugging_faces(image, size, preprocess, backend=""))
        in_its_order, largest = {"bilinear": (1, 1), "bicubic": (2, 30)}[preprocess.interpolation]
        assert np.abs(theirs - across_then_down(image, size, preprocess)).max() <= in_its_order, what
        assert np.abs(theirs - ours).max() <= largest, what
