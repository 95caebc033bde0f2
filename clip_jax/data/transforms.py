"""From an encoded image to the tower's pixels, on the host and on PIL: uint8, RGB, square."""

import io

import numpy as np
from PIL import Image

from clip_jax.typing import UInt8


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
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if short != size:
        scaled = int(size * long / short)
        image = image.resize((size, scaled) if width <= height else (scaled, size), Image.Resampling.BICUBIC)
    width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))


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
