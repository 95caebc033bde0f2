"""Tar shards to read: pictures and captions of a few bytes."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from clip_jax.data import storage
from clip_jax.data.shard_index import Choice
from clip_jax.data.storage import File

CHOICE = Choice(image_keys=("jpg", "png"), caption_keys=("txt",), min_image_size=1, max_image_pixels=10_000)

Files = Iterable[tuple[str, bytes]]


def picture(width: int = 8, height: int = 6, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 0)).save(file, form, **options)
    return file.getvalue()


def tar_of(files: Files) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", encoding="utf-8", errors="surrogateescape") as writer:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            writer.addfile(info, io.BytesIO(content))
    return file.getvalue()


def records(number: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Returns the files of good records; every picture has a size of its own."""
    pairs = [(f"{i:05}", picture(5 + i, 7 + i), f"caption {i}".encode()) for i in range(first, first + number)]
    return [part for key, image, text in pairs for part in ((f"{key}.png", image), (f"{key}.txt", text))]


def shard(path: Path, files: Files) -> File:
    """Writes a shard, and returns it as it is then."""
    path.write_bytes(tar_of(files))
    return looked_up(path)


def looked_up(path: Path | str) -> File:
    [file] = storage.look_up([str(path)])
    return file
