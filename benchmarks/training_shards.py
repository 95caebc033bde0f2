"""Shards to measure on, written by webdataset itself as img2dataset does: pictures and captions that take as much work
as those of the web, in all shapes.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rich.progress
from PIL import Image, ImageDraw

from clip_jax.data import transforms
from clip_jax.tokenizer.clip import vocabulary

SHAPES = (1, 5 / 4, 4 / 3, 4 / 3, 3 / 2, 3 / 2, 16 / 9, 2)  # of photographs, long side to short


def picture(random: np.random.Generator, short: int) -> bytes:
    """Returns a JPEG that takes as many bits as photographs do: colours that flow, edges, texture, a sensor's noise."""
    long = round(short * float(random.choice(SHAPES)))
    width, height = size = (long, short) if random.random() < 2 / 3 else (short, long)
    image = Image.fromarray(random.integers(0, 256, (4, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for left, top, wide, high in random.random((int(random.integers(5, 25)), 4)) * [*size, short / 3, short / 3]:
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape([left, top, left + wide, top + high], fill=tuple(random.integers(0, 256, 3).tolist()))
    pixels = np.asarray(image).astype(np.float32)
    rough = random.uniform(20, 90)
    for cells in (8, 16, 32, 64, 128, 256):
        grid = random.normal(0, rough / cells**0.2, (cells * height // short, cells * width // short))
        texture = Image.fromarray(grid.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        pixels += np.asarray(texture)[..., None]
    pixels += random.normal(0, 2.5, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def captions(random: np.random.Generator) -> Iterator[str]:
    """Yields texts of English words, the frequent ones often, some of them names, with what else is in alt texts."""
    words = [word[:-4] for word in vocabulary() if word.endswith("</w>") and word[:-4].isalpha() and word.isascii()]
    words = [word for word in words if len(word) > 2]
    while True:
        places = len(words) ** random.random(int(random.integers(4, 22)))
        text = [words[int(place) - 1] for place in places]
        text[0] = text[0].capitalize()
        if random.random() < 0.4:
            text[-1] = (text[-1] + words[random.integers(len(words))]).capitalize()
        if random.random() < 0.3:
            text.insert(-1, str(random.integers(1, 2030)))
        yield " ".join(text) + str(random.choice(["", ".", ", 2", " - Photo", " (detail)", "!"]))


def write(folder: Path, shards: int, each: int, short: int, pictures: int) -> None:
    """Writes shards as img2dataset does, of so many different pictures."""
    import webdataset

    random = np.random.default_rng(0)
    images, texts = [picture(random, short) for _ in range(pictures)], captions(random)
    sizes = [transforms.header_size(image) for image in images]
    for shard in rich.progress.track(range(shards), f"writing {shards * each:,} records"):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as file:
            for i in range(each):
                key, which, text = f"{shard:05d}{i:04d}", int(random.integers(pictures)), next(texts)
                about = {"caption": text, "url": f"https://example.org/{key}.jpg", "key": key, "status": "success"}
                about |= {"error_message": None, "width": sizes[which][0], "height": sizes[which][1], "exif": "{}"}
                about |= {"original_width": 2 * sizes[which][0], "original_height": 2 * sizes[which][1]}
                about |= {"sha256": f"{random.integers(1 << 62):064x}"}
                file.write({"__key__": key, "jpg": images[which], "txt": text, "json": json.dumps(about).encode()})
