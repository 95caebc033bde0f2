"""Pixels: crops are uint8 RGB squares, the random crop is what it says, and damage is told as OSError."""

import contextlib
import io
import struct
import zlib

import numpy as np
import oracles
import pytest
from PIL import Image

from clip_jax.architecture import Preprocess
from clip_jax.data import transforms
from clip_jax.data.problems import BadRecord, Problem

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


def file_of(image: Image.Image, kind: str = "") -> bytes:
    """Returns an image as a file that keeps its pixels, or of the kind given."""
    file = io.BytesIO()
    image.save(file, kind or ("TIFF" if image.mode == "CMYK" else "PNG"))
    return file.getvalue()


def crop(
    image: Image.Image, size: int, preprocess: Preprocess = OPENAI, *, seed: int = 0, **augmentation
) -> np.ndarray:
    """Returns a training crop of an image."""
    random = np.random.default_rng(seed)
    return transforms.training_crop(file_of(image), size, preprocess, transforms.Augmentation(**augmentation), random)


@pytest.mark.parametrize("mode", MODES)
def test_both_crops_give_uint8_rgb_squares_of_any_mode(mode):
    random = np.random.default_rng(0)
    for width, height in [(40, 25), (16, 16), (1, 9)]:
        image = picture(random, width, height, mode)
        crops = (
            transforms.evaluation_crop(image, 16, OPENAI),
            crop(image, 16, crop_scale=(0.2, 1.0)),
        )
        for square in crops:
            assert square.shape == (16, 16, 3)
            assert square.dtype == np.uint8


def places(width: int, height: int) -> Image.Image:
    """Returns an image whose red says how far to the right a pixel is, and whose green how far down."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.uint8(np.round(255 * np.stack([x, y, 0 * x], axis=-1))))


def crop_of(image: Image.Image, scale: tuple[float, float], seed: int, **augmentation) -> tuple[np.ndarray, np.ndarray]:
    """Returns (left, top) and (width, height) of a random crop, as shares of the image, to about 1 %."""
    pixels = crop(image, 64, seed=seed, crop_scale=scale, **augmentation) / 255
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
    found = crop(image, 16, crop_scale=(1.0, 1.0))
    np.testing.assert_array_equal(found, np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)))


def test_a_random_crop_is_made_with_the_models_interpolation_on_its_background():
    image, every = picture(np.random.default_rng(1), 50, 50, "RGBA"), {"crop_scale": (1.0, 1.0)}
    for preprocess in (Preprocess(interpolation="bilinear"), Preprocess(interpolation="bilinear", rgb_first=True)):
        found = crop(image, 16, preprocess, **every)
        rgb = transforms.on_white(image) if preprocess.rgb_first else image.convert("RGB")
        np.testing.assert_array_equal(found, np.asarray(rgb.resize((16, 16), Image.Resampling.BILINEAR)))


def test_the_same_stream_gives_the_same_crop():
    image = picture(np.random.default_rng(2), 60, 40)
    one, again, other = (crop(image, 16, seed=seed, crop_scale=(0.2, 1.0)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_a_ratio_makes_the_crop_wider_or_higher_and_keeps_its_area():
    ratios, shares = [], []
    for seed in range(200):
        _, (width, height) = crop_of(places(300, 300), (0.3, 0.3), seed, crop_ratio=(0.5, 2.0))
        ratios.append(width / height)
        shares.append(width * height)
    assert shares == pytest.approx([0.3] * 200, abs=0.02)
    assert 0.48 < min(ratios) < 0.55
    assert 1.8 < max(ratios) < 2.1
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.1), "wide as often as high"


def test_a_ratio_that_the_shape_cannot_give_is_kept_in_a_smaller_crop():
    for seed in range(20):
        _, (width, height) = crop_of(places(100, 300), (1.0, 1.0), seed, crop_ratio=(2.0, 2.0))
        assert (100 * width, 300 * height) == pytest.approx((100, 50), abs=3)


def test_every_other_image_is_flipped_and_only_when_asked():
    image = places(64, 64)
    rising = [int(crop(image, 32, seed=seed, flip=True)[0, -1, 0]) > 128 for seed in range(200)]
    assert 70 < sum(rising) < 130
    assert all(int(crop(image, 32, seed=seed)[0, -1, 0]) > 128 for seed in range(50))


# --- what a JPEG's smaller versions give ---


@pytest.mark.parametrize(("width", "height"), [(640, 480), (481, 639), (1000, 1003), (224, 700), (447, 449)])
def test_a_jpeg_is_decoded_no_smaller_than_the_crop_needs_and_shows_the_same_part(width, height, monkeypatch):
    decoded = []
    resize = Image.Image.resize

    def noted(image, size, resample, box):
        decoded.append((box[2] - box[0], box[3] - box[1]))
        assert 0 <= box[0] < box[2] <= image.width
        assert 0 <= box[1] < box[3] <= image.height
        return resize(image, size, resample, box=box)

    smooth = picture(np.random.default_rng(3), width // 20, height // 20).resize((width, height))
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=95)
    monkeypatch.setattr(Image.Image, "resize", noted)
    for seed in range(10):
        augmentation = transforms.Augmentation(crop_scale=(0.1, 1.0))
        arguments = (100, OPENAI, augmentation)
        small = transforms.training_crop(file.getvalue(), *arguments, np.random.default_rng(seed))
        lossless = file_of(Image.open(io.BytesIO(file.getvalue())))
        whole = transforms.training_crop(lossless, *arguments, np.random.default_rng(seed))
        reduced, full = decoded[-2:]
        assert min(reduced) >= min(100, min(full)) - 1e-9
        assert max(reduced) < 200 + 1e-9 or reduced == full, "it was decoded as small as can be"
        assert np.abs(small.astype(int) - whole).mean() < 2
    assert len(decoded) == 20


def test_other_formats_are_decoded_whole():
    image = picture(np.random.default_rng(1), 400, 400)
    found = crop(image, 50, crop_scale=(1.0, 1.0))
    np.testing.assert_array_equal(found, np.asarray(image.resize((50, 50), Image.Resampling.BICUBIC)))


# --- colours ---


def test_jitter_is_what_torchvision_does_with_the_same_numbers():
    functional = oracles.torchvision().transforms.functional
    image = picture(np.random.default_rng(5), 40, 40)
    for turn in (-0.5, -0.2, 0.0, 0.07, 0.5):
        expected = functional.adjust_hue(image, turn)
        np.testing.assert_array_equal(np.asarray(transforms.CHANGES[-1](image, turn)), np.asarray(expected))
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation")
    for change, name in zip(transforms.CHANGES, names, strict=False):
        for factor in (0.0, 0.4, 1.0, 1.7):
            expected = getattr(functional, name)(image, factor)
            np.testing.assert_array_equal(np.asarray(change(image, factor)), np.asarray(expected))


def test_jitter_stays_within_its_strengths_and_nothing_changes_at_zero():
    image = picture(np.random.default_rng(1), 32, 32)
    plain = crop(image, 32, crop_scale=(1.0, 1.0))
    for seed in range(3):
        same = crop(image, 32, seed=seed, crop_scale=(1.0, 1.0), color_jitter=(0.0, 0.0, 0.0, 0.0))
        assert np.abs(same.astype(int) - plain).max() <= 6, "only what the way through HSV rounds"
    brighter = [
        crop(image, 32, seed=seed, crop_scale=(1.0, 1.0), color_jitter=(0.5, 0.0, 0.0, 0.0)).mean() / plain.mean()
        for seed in range(40)
    ]
    assert 0.45 < min(brighter) < 0.65
    assert 1.15 < max(brighter) < 1.5


# --- what cannot be trained on ---


def bomb() -> bytes:
    """Returns a PNG whose header says 30,000 × 30,000."""
    return png(30_000, 30_000, (b"IDAT", ROWS))


def problem_of(data: bytes, **limits: int) -> Problem:
    with pytest.raises(BadRecord) as caught:
        transforms.training_crop(data, 8, OPENAI, transforms.Augmentation(**limits), np.random.default_rng(0))
    return caught.value.problem


def test_the_reason_is_told_apart():
    jpeg = encoded("JPEG")
    assert problem_of(b"") == problem_of(b"<html>") == Problem.NOT_AN_IMAGE
    assert problem_of(jpeg[:-60]) == problem_of(encoded("PNG")[:200]) == Problem.DAMAGED
    assert problem_of(bomb()) == Problem.TOO_LARGE
    assert problem_of(encoded("PNG"), max_image_pixels=1199) == Problem.TOO_LARGE
    assert problem_of(encoded("PNG"), min_image_size=31) == Problem.TOO_SMALL


def test_limits_are_met_from_within():
    assert crop(picture(np.random.default_rng(0), 40, 30), 8, min_image_size=30, max_image_pixels=1200).any()


def test_sixteen_bits_of_grey_are_all_shown():
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    found = crop(Image.fromarray(ramp), 8, crop_scale=(1.0, 1.0))
    np.testing.assert_array_equal(found, np.repeat((ramp >> 8)[..., None], 3, axis=-1))


def test_a_palette_with_transparency_and_an_animation_are_cropped_without_a_warning():
    palette = picture(np.random.default_rng(0), 20, 20, "P")
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=bytes(range(32)))
    frames = [picture(np.random.default_rng(seed), 20, 20) for seed in range(2)]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    for data in (file.getvalue(), gif.getvalue()):
        found = transforms.training_crop(
            data, 20, OPENAI, transforms.Augmentation((1.0, 1.0)), np.random.default_rng(0)
        )
        first = Image.open(io.BytesIO(data))
        first.info.clear()
        np.testing.assert_array_equal(found, np.asarray(first.convert("RGB")))


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
            with contextlib.suppress(OSError):
                transforms.decode(bytes(data))
            with contextlib.suppress(BadRecord):
                arguments = (8, OPENAI, transforms.Augmentation(), np.random.default_rng(0))
                assert transforms.training_crop(bytes(data), *arguments).shape == (8, 8, 3)
