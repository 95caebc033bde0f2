"""Random images: as many captions and labels as are wanted, and some that cannot be read."""

import io

import numpy as np
from in_memory import InMemory
from PIL import Image

from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources import Record


class Noise(InMemory):
    """Random images: as many captions and labels as are wanted, and some that cannot be read."""

    name = "noise"

    def __init__(
        self,
        length: int = 19,
        *,
        captions: int = 2,
        labels: bool = True,
        bad: tuple[int, ...] = (),
        classnames: tuple[str, ...] = ("a", "b", "c"),
        size: tuple[int, int] = (20, 20),
    ):
        self.classnames = classnames if labels else ()
        self.bad, self.asked = bad, []
        self._length, self._captions, self._labels, self._size = length, captions, labels, size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        self.asked.append(index)
        if index in self.bad:
            raise BadRecord(Problem.NO_IMAGE)
        width, height = self._size
        file = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        captions = tuple(f"text {which} of record {index}" for which in range(self._captions))
        label = index % len(self.classnames) if self._labels else None
        return Record(file.getvalue(), captions, label, f"{index:03d}" if index % 2 else "")

    def fingerprint(self) -> dict:
        return super().fingerprint() | {"captions": self._captions, "labels": self._labels}
