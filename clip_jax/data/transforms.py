"""From an encoded image to the tower's pixels, on the host and on PIL: uint8, RGB, square."""

import io

import numpy as np
from PIL import Image, ImageOps

from clip_jax.architecture import Preprocess
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


def random_crop(
    image: Image.Image,
    size: int,
    preprocess: Preprocess,
    *,
    scale: tuple[float, float],
    random: np.random.Generator,
) -> UInt8[np.ndarray, "H W C"]:
    """Returns a random square that keeps a share within `scale` of the image's area, resized to `size`.

    CLIP's only augmentation (section 2.4). A share that the shorter side cannot give is cut down to what it can.
    """
    width, height = image.size
    side = min((random.uniform(*scale) * width * height) ** 0.5, width, height)
    left, top = random.uniform(0, width - side), random.uniform(0, height - side)
    box = (left, top, left + side, top + side)
    rgb = on_white(image) if preprocess.rgb_first else image.convert("RGB")
    return np.asarray(rgb.resize((size, size), RESAMPLING[preprocess.interpolation], box=box))
