"""Small tar shards, as img2dataset writes them: made by Python's own tarfile."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, *, width: int = 24, height: int = 20, kind: str = "JPEG") -> bytes:
    """Returns an encoded image whose mean colour says which it is."""
    random = np.random.default_rng(number)
    colour = random.integers(0, 256, 3)
    pixels = np.clip(colour + random.normal(0, 20, (height, width, 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind)
    return file.getvalue()


def files(number: int, **changes: bytes | None) -> dict[str, bytes]:
    """Returns the files of a good record by their kind; None takes one away."""
    about = {"caption": f"number {number}", "status": "success", "width": 24, "height": 20, "sha256": "…"}
    good = {"jpg": picture(number), "txt": f"number {number}".encode(), "json": json.dumps(about).encode()}
    return {kind: content for kind, content in (good | changes).items() if content is not None}


def write(path: Path, records: Iterable[tuple[str, dict[str, bytes]]]) -> Path:
    """Writes a shard of (key, files)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, content in records:
            for kind, data in content.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def write_several(folder: Path, *, shards: int, records: int) -> Path:
    """Writes good shards 00000.tar, 00001.tar … of `records` each, numbered through."""
    for shard in range(shards):
        numbers = range(shard * records, (shard + 1) * records)
        write(folder / f"{shard:05}.tar", [(f"{number:08}", files(number)) for number in numbers])
    return folder
