"""Images to prove preprocessing with: 21 modes of PIL's × 12 shapes, and 38 kinds of file."""

import io
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Width and height, and the sizes they are brought to: equal, larger and smaller, the difference odd and even.
SHAPES = {
    **{(224, 224): (224, 40), (288, 401): (288, 16), (97, 40): (40, 224), (16, 17): (16, 40), (640, 427): (224, 16)},
    **{(300, 701): (40, 288), (225, 448): (224, 16), (97, 64): (40, 16), (51, 7): (16, 336), (2, 9): (40, 16)},
    **{(3, 2): (224, 16), (1, 1): (16, 40)},
}
MODES = ["RGB", "RGBX", "RGBA", "RGBa", "L", "LA", "P", "P + index", "P + bytes", "PA", "CMYK", "YCbCr", "LAB", "HSV"]
MODES += ["1", "I;16", "I;16L", "I;16B", "I;16N", "I", "F"]


def drawn(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Returns gradients with sharp edges and noise; a palette's colours may be transparent, by "index" or "bytes"."""
    random = np.random.default_rng([seed, width, height])
    mode, _, transparency = mode.partition(" + ")
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    bands = np.uint8((x * 3 + y * 5)[..., None] * [1, 2, 3, 5] + random.integers(0, 40, (height, width, 4)) & 255)
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (width, height), random.integers(0, 2**16, (height, width), np.uint16).tobytes())
    if mode == "I":
        return Image.fromarray(random.integers(-100, 1000, (height, width), np.int32))
    if mode == "F":
        return Image.fromarray(np.float32(random.uniform(-100, 400, (height, width))))
    if mode == "LAB":
        return Image.frombytes(mode, (width, height), bands[..., :3].tobytes())
    image = Image.fromarray(bands, "RGBA")
    if mode in ("RGBA", "RGBa", "LA", "La"):
        return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    if mode not in ("P", "PA"):
        return image.convert("RGB").convert(mode)
    image = image.convert("RGB").quantize(32, Image.Quantize.FASTOCTREE).convert(mode)
    if transparency:
        image.info["transparency"] = {"index": 3, "bytes": bytes(range(0, 256, 8))}[transparency]
    return image


def compose(steps, image):
    for step in steps:
        image = step(image)
    return image


class Kind(NamedTuple):
    """A kind of file, and what PIL has to read from it for the test to be about what its name says."""

    format: str
    drawn: str  # the mode it is drawn in, and read in
    options: Mapping[str, Any] = MappingProxyType({})
    frames: int = 1
    orientation: int = 1


KINDS = {
    "PNG": Kind("PNG", "RGB"),
    "PNG, RGBA": Kind("PNG", "RGBA"),
    "PNG, grey": Kind("PNG", "L"),
    "PNG, grey with alpha": Kind("PNG", "LA"),
    "PNG, grey with one transparent": Kind("PNG", "L", options={"transparency": 90}),
    "PNG, a transparent colour": Kind("PNG", "RGB", options={"transparency": (9, 8, 7)}),
    "PNG, palette": Kind("PNG", "P"),
    "PNG, palette with one transparent": Kind("PNG", "P + index"),
    "PNG, palette with alpha": Kind("PNG", "P + bytes"),
    "PNG, 1-bit": Kind("PNG", "1"),
    "PNG, 16-bit": Kind("PNG", "I;16"),
    "PNG, animated": Kind("PNG", "RGBA", frames=3),
    "JPEG": Kind("JPEG", "RGB", options={"quality": 90}),
    "JPEG, grey": Kind("JPEG", "L"),
    "JPEG, CMYK": Kind("JPEG", "CMYK"),
    "JPEG, progressive": Kind("JPEG", "RGB", options={"progressive": True}),
    **{f"JPEG, EXIF orientation {i}": Kind("JPEG", "RGB", orientation=i) for i in (2, 3, 6, 8)},
    "JPEG 2000": Kind("JPEG2000", "RGBA"),
    "GIF": Kind("GIF", "P"),
    "GIF, transparent": Kind("GIF", "P + index"),
    "GIF, animated": Kind("GIF", "P", frames=3),
    "GIF, animated, transparent": Kind("GIF", "P + index", frames=3),
    "WebP": Kind("WEBP", "RGB"),
    "WebP, alpha": Kind("WEBP", "RGBA", options={"lossless": True}),
    "WebP, animated": Kind("WEBP", "RGB", frames=3),
    "WebP, EXIF orientation": Kind("WEBP", "RGB", orientation=6),
    "BMP": Kind("BMP", "RGB"),
    "BMP, palette": Kind("BMP", "P"),
    "BMP, 1-bit": Kind("BMP", "1"),
    "TIFF": Kind("TIFF", "RGB", options={"compression": "tiff_lzw"}),
    "TIFF, 16-bit": Kind("TIFF", "I;16"),
    "TIFF, CMYK": Kind("TIFF", "CMYK"),
    "TIFF, Lab": Kind("TIFF", "LAB"),
    "TIFF, float": Kind("TIFF", "F"),
    "TIFF, EXIF orientation": Kind("TIFF", "RGB", orientation=6),
}


def encoded(kind: Kind, width: int, height: int) -> bytes:
    images = [drawn(kind.drawn, width, height, seed) for seed in range(kind.frames)]
    options = {**kind.options}
    if kind.orientation != 1:
        options["exif"] = exif = Image.Exif()
        exif[0x0112] = kind.orientation
    if kind.frames > 1:
        options |= {"save_all": True, "append_images": images[1:]}
    file = io.BytesIO()
    images[0].save(file, kind.format, **options)
    return file.getvalue()
