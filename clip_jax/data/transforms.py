"""From an encoded image to the tower's pixels, on the host and on PIL: uint8, RGB, square."""

import io

import numpy as np
from PIL import Image

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


def evaluation_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "H W C"]:
    """Returns the centre square as OpenAI's preprocessing makes it.

    The shorter side is resized to `size` (bicubic), the centre cropped out, and only then converted to RGB: PIL resizes
    a palette or a transparent image differently from its RGB copy, so the order shows.

    Raises:
        UserError: an image without pixels, one too narrow, or one of a mode that PIL does not turn into RGB.
    """
    image.load()  # first and apart: what is wrong with the data has nothing to do with the mode
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if not 0 < long <= MAX_RATIO * short:
        raise UserError(
            f"an image of {width} × {height} pixels cannot be prepared; sides must be within 1 : {MAX_RATIO}"
        )
    scaled = int(size * long / short)
    width, height = whole = (size, scaled) if width <= height else (scaled, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    box = (left, top, left + size, top + size)
    try:
        if short < size:
            image = _enlarge_and_crop(image, whole, box)
        else:
            image = image.resize(whole, Image.Resampling.BICUBIC).crop(box)
        image.info.pop("transparency", None)  # RGB has none, and PIL would warn of it
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise UserError(f"an image of mode {image.mode!r} cannot be prepared: {error}; convert it to RGB") from error


def _enlarge_and_crop(image: Image.Image, whole: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Returns what `image.resize(whole, BICUBIC).crop(box)` does for a larger whole, of which it holds only a part.

    PIL enlarges across, then down (reducing, it may go the other way round). With the two apart, the crop can come in
    between, and the way down goes in strips: 1 × 65,535 pixels take 2 GB at 224, not 13.
    """
    (width, height), (left, top, right, bottom) = whole, box
    mode = image.mode
    if mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[mode])
    image = image.resize((width, image.height), Image.Resampling.BICUBIC).crop((left, 0, right, image.height))
    square = image.crop((0, 0, right - left, bottom - top))
    step = max(1, STRIP_PIXELS // height)
    for x in range(0, image.width, step):
        strip = image.crop((x, 0, min(x + step, image.width), image.height))
        strip = strip.resize((strip.width, height), Image.Resampling.BICUBIC)
        square.paste(strip.crop((0, top, strip.width, bottom)), (x, 0))
    return square.convert(mode)


def random_crop(
    image: Image.Image, size: int, *, scale: tuple[float, float], random: np.random.Generator
) -> UInt8[np.ndarray, "H W C"]:
    """Returns a random square that keeps a share within `scale` of the image's area, resized to `size` (bicubic).

    CLIP's only augmentation (section 2.4). A share that the shorter side cannot give is cut down to what it can.
    """
    width, height = image.size
    side = min((random.uniform(*scale) * width * height) ** 0.5, width, height)
    left, top = random.uniform(0, width - side), random.uniform(0, height - side)
    box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box))
