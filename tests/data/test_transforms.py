"""Pixels: crops are uint8 RGB squares, the random crop is what it says, and damage is told as OSError."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from clip_jax.architecture import Preprocess
from clip_jax.data import transforms

OPENAI = Preprocess()
MODES = ("RGB", "L", "P", "RGBA", "1", "CMYK", "LA")


def picture(random: np.random.Generator, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Returns smooth waves with some noise, in any mode."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    frequencies, phases = random.uniform(0.02, 0.4, (2, 4)), random.uniform(0, 6, 4)
    waves = np.stack([np.sin(f * x + g * y + p) for f, g, p in zip(*frequencies, phases, strict=True)], axis=-1)
    pixels = np.uint8(np.clip(127 + 110 * waves + random.normal(0, 10, waves.shape), 0, 255))
    image = Image.fromarray(pixels, "RGBA")
    return (
        image.quantize(32)
        if mode == "P"
        else image.convert("RGB").convert(mode)
        if mode in ("1", "CMYK")
        else image.convert(mode)
    )


@pytest.mark.parametrize("mode", MODES)
def test_both_crops_give_uint8_rgb_squares_of_any_mode(mode):
    random = np.random.default_rng(0)
    for width, height in [(40, 25), (16, 16), (1, 9)]:
        image = picture(random, width, height, mode)
        crops = (
            transforms.evaluation_crop(image, 16, OPENAI),
            transforms.random_crop(image, 16, OPENAI, scale=(0.2, 1.0), random=random),
        )
        for crop in crops:
            assert crop.shape == (16, 16, 3)
            assert crop.dtype == np.uint8


def places(width: int, height: int) -> Image.Image:
    """Returns an image whose red says how far to the right a pixel is, and whose green how far down."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.uint8(np.round(255 * np.stack([x, y, 0 * x], axis=-1))))


def crop_of(image: Image.Image, scale: tuple[float, float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (left, top) and (width, height) of a random crop, as shares of the image, to about 1 %."""
    pixels = transforms.random_crop(image, 64, OPENAI, scale=scale, random=np.random.default_rng(seed)) / 255
    low, high = pixels.min(axis=(0, 1))[:2], pixels.max(axis=(0, 1))[:2]
    return low, (high - low) * 64 / 63  # from the centres of the outer pixels to their edges


def test_a_random_crop_is_a_square_that_keeps_a_share_of_the_area_within_the_scale():
    image = places(300, 200)
    shares, corners = [], []
    for seed in range(200):
        corner, (width, height) = crop_of(image, (0.2, 0.5), seed)
        assert 300 * width == pytest.approx(200 * height, abs=6)
        shares.append(width * height)
        corners.append(corner / (1 - np.array([width, height])))
    assert 0.19 < min(shares) < 0.22 < 0.47 < max(shares) < 0.52
    assert np.min(corners) < 0.03, "crops reach the left and the upper edge"
    assert np.max(corners) > 0.97, "crops reach the right and the lower edge"
    assert np.corrcoef(np.transpose(corners))[0, 1] == pytest.approx(0, abs=0.2), "the two directions are drawn apart"


def test_a_share_that_the_shorter_side_cannot_give_is_cut_to_the_largest_square():
    lefts = []
    for seed in range(50):
        (left, top), (width, height) = crop_of(places(300, 100), (1.0, 1.0), seed)
        assert (top, width, height) == pytest.approx((0, 1 / 3, 1), abs=0.02)
        lefts.append(left)
    assert np.ptp(lefts) > 0.5


def test_scale_one_of_a_square_is_the_whole_image_resized():
    image = picture(np.random.default_rng(1), 50, 50)
    found = transforms.random_crop(image, 16, OPENAI, scale=(1.0, 1.0), random=np.random.default_rng(0))
    np.testing.assert_array_equal(found, np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)))


def test_a_random_crop_is_made_with_the_models_interpolation_on_its_background():
    image, every = picture(np.random.default_rng(1), 50, 50, "RGBA"), {"scale": (1.0, 1.0)}
    for preprocess in (Preprocess(interpolation="bilinear"), Preprocess(interpolation="bilinear", rgb_first=True)):
        found = transforms.random_crop(image, 16, preprocess, random=np.random.default_rng(0), **every)
        rgb = transforms.on_white(image) if preprocess.rgb_first else image.convert("RGB")
        np.testing.assert_array_equal(found, np.asarray(rgb.resize((16, 16), Image.Resampling.BILINEAR)))


def test_the_same_stream_gives_the_same_crop():
    image = picture(np.random.default_rng(2), 60, 40)
    one, again, other = (
        transforms.random_crop(image, 16, OPENAI, scale=(0.2, 1.0), random=np.random.default_rng(seed))
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


# --- decoding ---


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    picture(np.random.default_rng(0), 40, 30).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "JPEG"])
def test_an_image_is_decoded_in_the_mode_it_is_stored_in(kind):
    image = transforms.decode(encoded(kind))
    assert (image.size, image.mode) == ((40, 30), "RGB")
    if kind in ("PNG", "BMP"):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(np.random.default_rng(0), 40, 30)))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG file of RGB pixels with the given (name, content) after its header."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [
        struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in (header, *chunks)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


ROWS = zlib.compress(b"".join(b"\0" + np.random.default_rng(row).bytes(24) for row in range(8)))

DAMAGED = {
    "nothing": b"",
    "no image": b"<html>404 Not Found</html>",
    "a JPEG cut short": encoded("JPEG")[:400],
    "a PNG cut short": encoded("PNG")[:200],
    "a PNG with a broken chunk": png(8, 8, (b"IDAT", ROWS[:50]), (b"\xfc...", b"")),
    "a PNG of 400 megapixels": png(20_000, 20_000, (b"IDAT", ROWS)),
    "a PPM whose width is no number": b"P6\n4x 4\n255\n" + bytes(48),
}


def test_the_damaged_pngs_would_be_whole_without_their_damage():
    assert transforms.decode(png(8, 8, (b"IDAT", ROWS))).size == (8, 8)
    assert transforms.decode(png(8, 8, (b"IDAT", ROWS[:50]), (b"IDAT", ROWS[50:]))).size == (8, 8)


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_whatever_is_wrong_with_an_image_is_an_oserror(data):
    with pytest.raises(OSError, match=r"."):
        transforms.decode(data)


def test_a_few_wrong_bytes_give_an_image_or_an_oserror():
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        good = encoded(kind)
        for _ in range(100):
            data = bytearray(good)
            for at in random.integers(0, min(len(data), 300), random.integers(1, 4)):
                data[at] = random.integers(256)
            try:
                transforms.decode(bytes(data))
            except OSError:
                continue
