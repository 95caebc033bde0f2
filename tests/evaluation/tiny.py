"""What evaluations are tested with: a small model with random weights, and data sets in memory."""

import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from in_memory import InMemory
from PIL import Image

from clip_jax import sharding
from clip_jax.config import MeshConfig, ModelConfig
from clip_jax.data.sources import Inventory, Record
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.models.clip import Definition
from clip_jax.models.variants import architecture
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import flatten

VARIANT = "ViT-W64/4@16px"
CLASSNAMES = ("cat", "dog", "bird", "fish", "horse", "snail")


@functools.cache
def bundle(seed: int = 0) -> Bundle:
    """Returns a model's weights."""
    definition = Definition(architecture(ModelConfig(variant=VARIANT)))
    arrays = {path: np.asarray(x) for path, x in flatten(jax.jit(definition.init)(jax.random.key(seed))).items()}
    return Bundle(definition.architecture, arrays, VARIANT, f"random {seed}" if seed else "random")


def model(devices: int = 1, *, seed: int = 0, batch_size: int = 4, **options: Any) -> OnMesh:
    """Returns a model on some of the devices."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    return OnMesh.of(bundle(seed), mesh, batch_size=batch_size, **options)


@dataclasses.dataclass(frozen=True)
class Memory(InMemory):
    """Pictures whose colour goes by their class, with noise; those in `damaged` cannot be decoded."""

    length: int
    damaged: tuple[int, ...] = ()
    name: str = InMemory.name
    split: str = InMemory.split
    classnames: tuple[str, ...] = CLASSNAMES
    templates: tuple[str, ...] = ()
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    captions: int = 1  # an image has up to so many

    def __len__(self) -> int:
        return self.length

    def label(self, index: int) -> int:
        return int(np.random.default_rng([1, index]).integers(len(CLASSNAMES)))

    def __getitem__(self, index: int) -> Record:
        random, file = np.random.default_rng(index), io.BytesIO()
        colour = np.random.default_rng([2, self.label(index)]).integers(0, 256, 3)
        pixels = np.clip(colour + random.normal(0, 60, (20, 18, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        image = file.getvalue()[:60] if index in self.damaged else file.getvalue()
        captions = tuple(f"picture {index} in {n} words" for n in range(1 + index % self.captions))
        return Record(image, captions, self.label(index), f"id {index}")

    def inventory(self) -> Inventory:
        return Inventory(shards=1, left_out=dict(self.left_out))
