"""`captioned_shapes`: drawn scenes, each a composition of colour, shape, size, place and background, with captions.

There are 8 × 6 × 3 × 9 × 4 = 5,184 compositions. The test split has 576 of them that never occur in training, so what
it measures is composition: every word was seen, the sentence was not.
"""

import io
import itertools
import math
import zlib
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (240, 220, 40),
    "green": (40, 150, 60),
    "blue": (30, 80, 220),
    "purple": (130, 50, 170),
    "pink": (250, 130, 190),
    "brown": (120, 72, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 0.085, "medium": 0.125, "large": 0.18}  # radius, as a share of the picture's side
PLACES = {
    "top left": (0.2, 0.2),
    "top": (0.5, 0.2),
    "top right": (0.8, 0.2),
    "left": (0.2, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.8, 0.5),
    "bottom left": (0.2, 0.8),
    "bottom": (0.5, 0.8),
    "bottom right": (0.8, 0.8),
}
BACKGROUNDS = ("white", "grey", "black", "striped")

CAPTIONS = (
    "a {size} {colour} {shape} in the {place} on a {background} background",
    "{background} background with a {size} {colour} {shape} at the {place}",
    "a {colour} {shape}, {size}, placed {place}, on {background}",
    "in the {place} of a {background} picture there is a {size} {shape} in {colour}",
    "the {place} shows one {size} {shape} that is {colour}; the background is {background}",
)

SIDE = 64  # pixels of a stored picture
OVERSAMPLED = 4  # drawn this many times larger, then averaged down: smooth edges
DRAWINGS = 3  # of each training composition
HELD_OUT = 576  # compositions


class Composition(NamedTuple):
    """What a scene shows, in words."""

    colour: str
    shape: str
    size: str
    place: str
    background: str


def compositions(*, held_out: bool) -> list[Composition]:
    """Returns those of the test split, or all the others; which is which depends on nothing but their words."""
    everything = itertools.starmap(Composition, itertools.product(COLOURS, SHAPES, SIZES, PLACES, BACKGROUNDS))
    shuffled = sorted(everything, key=lambda c: (zlib.crc32(" ".join(c).encode()), c))
    return shuffled[:HELD_OUT] if held_out else shuffled[HELD_OUT:]


class CaptionedShapes(tfds.core.GeneratorBasedBuilder):
    """Drawn scenes with captions in five wordings; the test split has compositions that training never shows."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="jpeg"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "label": tfds.features.ClassLabel(names=SHAPES),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(held_out=False, drawings=DRAWINGS),
            "test": self._generate_examples(held_out=True, drawings=1),
        }

    def _generate_examples(self, held_out: bool, drawings: int):
        for composition, drawing in itertools.product(compositions(held_out=held_out), range(drawings)):
            key = f"{' '.join(composition)} {drawing}"
            image = draw(composition, np.random.RandomState(zlib.crc32(key.encode())))
            captions = [caption.format(**composition._asdict()) for caption in CAPTIONS]
            yield key, {"image": _jpeg(image), "captions": captions, "label": composition.shape}


def draw(composition: Composition, random: np.random.RandomState) -> Image.Image:
    """Returns an RGB scene of SIDE × SIDE pixels; `random` moves, scales, tints and grains it a little."""
    side = SIDE * OVERSAMPLED
    image = _background(composition.background, side)
    x, y = (side * (centre + random.uniform(-0.02, 0.02)) for centre in PLACES[composition.place])
    radius = side * SIZES[composition.size] * random.uniform(0.94, 1.06)
    colour = tuple(int(c) for c in np.clip(np.array(COLOURS[composition.colour]) + random.randint(-12, 13, 3), 0, 255))
    _draw_shape(ImageDraw.Draw(image), composition.shape, x, y, radius, colour)
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    grained = small + random.normal(0, 3, small.shape)
    return Image.fromarray(np.clip(grained.round(), 0, 255).astype(np.uint8))


def _background(name: str, side: int) -> Image.Image:
    plain = {"white": (245, 245, 245), "grey": (150, 150, 150), "black": (12, 12, 12), "striped": (225, 225, 225)}
    image = Image.new("RGB", (side, side), plain[name])
    if name == "striped":
        pen = ImageDraw.Draw(image)
        for top in range(0, side, side // 8):
            pen.rectangle((0, top, side, top + side // 16), fill=(85, 85, 85))
    return image


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple) -> None:
    def polygon(sides: int, turn: float, reach: float):
        angles = (2 * math.pi * k / sides + turn for k in range(sides))
        pen.polygon([(x + reach * math.sin(a), y - reach * math.cos(a)) for a in angles], fill=colour)

    box = (x - radius, y - radius, x + radius, y + radius)
    arm = 0.32 * radius
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=round(0.42 * radius))
    elif shape == "square":
        polygon(4, math.pi / 4, 1.25 * radius)
    elif shape == "diamond":
        polygon(4, 0.0, 1.2 * radius)
    elif shape == "triangle":
        polygon(3, 0.0, 1.2 * radius)
    else:
        assert shape == "cross", shape
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def _jpeg(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, subsampling=0)  # full colour resolution: the shapes are small
    file.seek(0)
    return file
