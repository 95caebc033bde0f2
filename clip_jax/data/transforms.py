"""From an encoded image to the tower's pixels, on the host and on PIL: uint8, RGB, square."""

import dataclasses
import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from clip_jax.architecture import Preprocess
from clip_jax.config import MAX_IMAGE_PIXELS
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.errors import UserError
from clip_jax.typing import UInt8

MAX_RATIO = 65_535  # of the sides, long to short: the narrowest that a JPEG can be
STRIP_PIXELS = 2**28  # resized at once: 1 GiB
PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}  # what PIL makes of an image with alpha before it resizes it, and back


def decode(data: bytes) -> Image.Image:
    """Returns the image in the mode it was stored in.

    Raises:
        OSError: not an image, or a damaged one (PIL's own words).
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # PIL's readers raise what they like: SyntaxError, ValueError, DecompressionBombError
        raise OSError(f"{type(error).__name__}: {error}") from error
    return image


def evaluation_crop(image: Image.Image, size: int, preprocess: Preprocess) -> UInt8[np.ndarray, "H W C"]:
    """Returns the square that the tower sees of an image: resized, then cropped or filled up at its centre.

    PIL resizes a palette or a transparent image differently from its RGB copy, so it shows which comes first:
    OpenAI and OpenCLIP convert last, Hugging Face first.

    Raises:
        UserError: an image without pixels, one too narrow, or one of a mode that PIL does not turn into RGB.
    """
    image.load()  # first and apart: what is wrong with the data has nothing to do with the mode
    short, long = sorted(image.size)
    if not 0 < long <= MAX_RATIO * short:
        raise _too_narrow(image, f"sides must be within 1 : {MAX_RATIO}")
    whole = RESIZED[preprocess.resize](*image.size, size)
    if not min(whole):
        raise _too_narrow(image, f"with its longer side resized to {size} nothing is left of the other")
    resample = RESAMPLING[preprocess.interpolation]
    left, top = (_offset(side - size, preprocess.crop_floor) for side in whole)
    box = (left, top, left + size, top + size)
    try:
        if preprocess.rgb_first:
            image = on_white(image)
        if short < size < max(whole):
            image = _enlarge_and_crop(image, whole, box, resample)
        else:
            image = _crop_or_fill(image.resize(whole, resample), box, preprocess.fill)
        image.info.pop("transparency", None)  # RGB has none, and PIL would warn of it
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise UserError(f"an image of mode {image.mode!r} cannot be prepared: {error}; convert it to RGB") from error


def on_white(image: Image.Image) -> Image.Image:
    """Returns the image in RGB, white where it is transparent, as Hugging Face's preprocessing does."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _too_narrow(image: Image.Image, why: str) -> UserError:
    return UserError(f"an image of {image.width} × {image.height} pixels cannot be prepared; {why}")


def _shortest(width: int, height: int, size: int) -> tuple[int, int]:
    """Returns the image's size once its shorter side is `size`."""
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def _squash(width: int, height: int, size: int) -> tuple[int, int]:
    return size, size


def _longest(width: int, height: int, size: int) -> tuple[int, int]:
    """Returns the image's size once its longer side is `size`."""
    ratio = max(width, height) / size
    return round(width / ratio), round(height / ratio)


def _offset(spare: int, floor: bool) -> int:
    """Returns where a square begins on a side that has pixels to spare, or lacks some."""
    if spare < 0:
        return -(-spare // 2)  # of an odd number lacking, the greater half lies at the end
    return spare // 2 if floor else round(spare / 2)


def _crop_or_fill(image: Image.Image, box: tuple[int, int, int, int], fill: int) -> Image.Image:
    """Returns the box of an image; where it lies outside, all bands are `fill`, whatever the mode makes of that."""
    left, top, right, bottom = box
    border = (max(-left, 0), max(-top, 0), max(right - image.width, 0), max(bottom - image.height, 0))
    if any(border):
        bands = len(image.getbands())
        image = ImageOps.expand(image, border, fill if bands == 1 else (fill,) * bands)
    return image.crop((left + border[0], top + border[1], right + border[0], bottom + border[1]))


def _enlarge_and_crop(
    image: Image.Image, whole: tuple[int, int], box: tuple[int, int, int, int], resample: Image.Resampling
) -> Image.Image:
    """Returns what `image.resize(whole, resample).crop(box)` does for a larger whole, of which it holds only a part.

    PIL enlarges across, then down (reducing, it may go the other way round). With the two apart, the crop can come in
    between, and the way down goes in strips: 1 × 65,535 pixels take 2 GB at 224, not 13.
    """
    (width, height), (left, top, right, bottom) = whole, box
    mode = image.mode
    if mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[mode])
    image = image.resize((width, image.height), resample).crop((left, 0, right, image.height))
    square = image.crop((0, 0, right - left, bottom - top))
    step = max(1, STRIP_PIXELS // height)
    for x in range(0, image.width, step):
        strip = image.crop((x, 0, min(x + step, image.width), image.height))
        strip = strip.resize((strip.width, height), resample)
        square.paste(strip.crop((0, top, strip.width, bottom)), (x, 0))
    return square.convert(mode)


# What the words of `Preprocess` stand for.
RESIZED = {"shortest": _shortest, "squash": _squash, "longest": _longest}
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is random about a training image; the defaults are CLIP's only augmentation (section 2.4)."""

    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the area that is kept, where the shape allows
    crop_ratio: tuple[float, float] = (1.0, 1.0)  # of the crop's width to its height, evenly in its logarithm
    flip: bool = False  # left to right, every other time
    color_jitter: tuple[float, float, float, float] | None = None  # brightness, contrast, saturation, hue (± these)
    min_image_size: int = 1  # pixels of the shorter side
    max_image_pixels: int = MAX_IMAGE_PIXELS


def training_crop(
    data: bytes, size: int, preprocess: Preprocess, augmentation: Augmentation, random: np.random.Generator
) -> UInt8[np.ndarray, "H W C"]:
    """Returns a random part of an encoded image, resized to a square of `size`.

    A JPEG is decoded at a half, a quarter or an eighth of its size where the part has still `size` pixels a side then,
    which libjpeg does for a fraction of the time. A part that the image's shape cannot give is made smaller.

    Raises:
        BadRecord: not an image, a damaged one, or one too small or too large.
    """
    image = _opened(data)
    check_size(*image.size, augmentation.min_image_size, augmentation.max_image_pixels)
    left, top, right, bottom = _random_box(*image.size, augmentation, random)
    try:
        full = image.width
        shrunk = min((right - left) / size, (bottom - top) / size)
        if image.format == "JPEG" and shrunk >= 2:
            image.draft(None, (math.ceil(image.width / shrunk), math.ceil(image.height / shrunk)))
        scale = round(full / image.width)  # libjpeg rounds sizes up: the part lies within
        box = (left / scale, top / scale, right / scale, bottom / scale)
        image = _of_eight_bits(image)
        rgb = on_white(image) if preprocess.rgb_first else _rgb(image)
    except Exception as error:  # PIL's readers raise what they like
        raise BadRecord(Problem.DAMAGED) from error
    cropped = rgb.resize((size, size), RESAMPLING[preprocess.interpolation], box=box)
    if augmentation.flip and random.random() < 0.5:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augmentation.color_jitter is not None:
        cropped = _jittered(cropped, augmentation.color_jitter, random)
    return np.asarray(cropped)


def _opened(data: bytes) -> Image.Image:
    """Returns an image of which only the header is read."""
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord(Problem.TOO_LARGE) from error
    except Exception as error:  # PIL's readers raise what they like
        raise BadRecord(Problem.NOT_AN_IMAGE) from error


def header_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) of an image by its first bytes.

    Raises:
        BadRecord: they are not those of an image, or not enough of them.
    """
    return _opened(data).size


def check_size(width: int, height: int, min_size: int, max_pixels: int) -> None:
    """Raises BadRecord for an image that is too small or too large."""
    if min(width, height) < max(min_size, 1):
        raise BadRecord(Problem.TOO_SMALL)
    if width * height > max_pixels:
        raise BadRecord(Problem.TOO_LARGE)


def _random_box(
    width: int, height: int, augmentation: Augmentation, random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Returns (left, top, right, bottom) of the part that is kept."""
    area = random.uniform(*augmentation.crop_scale) * width * height
    along, down = random.random(2)
    ratio = math.exp(random.uniform(*map(math.log, augmentation.crop_ratio)))
    wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
    fits = min(1, width / wide, height / high)
    wide, high = min(wide * fits, width), min(high * fits, height)
    left, top = along * (width - wide), down * (height - high)
    return left, top, min(left + wide, width), min(top + high, height)


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Returns the image decoded, grey of 16 bits in 8: PIL would take all that is over 255 for white."""
    image.load()
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I;16") else image


def _rgb(image: Image.Image) -> Image.Image:
    image.info.pop("transparency", None)  # RGB has none, and PIL would warn of it
    return image if image.mode == "RGB" else image.convert("RGB")


def _jittered(
    image: Image.Image, strength: tuple[float, float, float, float], random: np.random.Generator
) -> Image.Image:
    """Returns the image with brightness, contrast, saturation and hue changed, in an order that is random too."""
    *factors, hue = strength
    amounts = [random.uniform(max(0, 1 - factor), 1 + factor) for factor in factors] + [random.uniform(-hue, hue)]
    for i in random.permutation(len(CHANGES)):
        image = CHANGES[i](image, amounts[i])
    return image


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def _hue(image: Image.Image, turn: float) -> Image.Image:
    """Returns the image with its hues turned by a share of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turn * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


CHANGES = (_brightness, _contrast, _saturation, _hue)  # with a factor each, and a share of the circle
