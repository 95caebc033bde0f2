"""Weights are laid on the device one after the other: no array is there twice."""

from collections import Counter

import jax
import numpy as np

from clip_jax import compiled
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.weights.mapping import flatten
from clip_jax.weights.streaming import Lazy

DEFINITION = Definition(VARIANTS["ViT-W64/4@16px"])
ARRAYS = {
    path: np.random.default_rng(0).normal(size=like.shape).astype(like.dtype)
    for path, like in flatten(DEFINITION.shapes()).items()
}


def assert_placed(placed: compiled.Placed) -> None:
    for path, x in flatten(compiled.stacked(placed, DEFINITION)).items():
        np.testing.assert_array_equal(x, ARRAYS[path])


def test_a_dict_is_emptied_on_the_way():
    given = dict(ARRAYS)
    assert_placed(compiled.place(given, DEFINITION))
    assert not given


def test_of_another_mapping_each_array_is_asked_for_once():
    asked: Counter[str] = Counter()

    def make(paths):
        asked.update(paths)
        yield from (ARRAYS[path].copy() for path in paths)

    given = Lazy(ARRAYS, [([path], make) for path in ARRAYS])
    placed = compiled.place(given, DEFINITION, jax.devices()[0])
    assert asked.keys() == ARRAYS.keys()
    assert sum(times > 1 for times in asked.values()) <= 1  # beartype looks at the first
    assert_placed(placed)
