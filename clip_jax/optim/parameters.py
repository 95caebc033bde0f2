"""What a parameter is to an optimiser: whether it decays, as which matrices it counts, and in which layer it lies.

By path, and never by `ndim`: in stacked blocks the scale of a layer norm has two dimensions, and a kernel five.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

Params = dict  # nested dicts of arrays, or of whatever is said of each array


class Matrix(NamedTuple):
    """Which dimensions of a parameter a product sums over, and which it makes, both counted from the end.

    What is left counts matrices: blocks of a stack; queries, keys and values.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns how many inputs and how many outputs each matrix has."""
        return tuple(int(np.prod([shape[dim] for dim in dims])) for dims in self)


NO_MATRIX = Matrix()
LINEAR = Matrix((-2,), (-1,))
TO_HEADS = Matrix((-3,), (-2, -1))
FROM_HEADS = Matrix((-3, -2), (-1,))
CONVOLUTION = Matrix((-4, -3, -2), (-1,))


@dataclasses.dataclass(frozen=True)
class Kind:
    """Parameters whose whole path matches `pattern`."""

    pattern: str
    decays: bool
    matrix: Matrix = NO_MATRIX
    hidden: bool = False  # from hidden states to hidden states: Muon's


# The first that matches a path holds. In front of these dimensions there may be that of a stack.
KINDS = (
    Kind(r".*/qkv/kernel", True, Matrix((-4,), (-2, -1)), hidden=True),  # [D 3 N K]
    Kind(r".*/(query|key|value)/kernel", True, TO_HEADS, hidden=True),  # [D N K]
    Kind(r"image/attention_pool/out/kernel", True, FROM_HEADS),  # [N K E]: a projection
    Kind(r".*/out/kernel", True, FROM_HEADS, hidden=True),  # [N K D]
    Kind(r".*/mlp/(up|down)/kernel", True, LINEAR, hidden=True),  # [D F], [F D]
    Kind(r"image/(patch_embed|stem1)/kernel", True, CONVOLUTION),  # [H W C D]: of pixels
    Kind(r"image/(stem\d|stage\d/.*)/kernel", True, CONVOLUTION, hidden=True),  # [H W D F]
    Kind(r".*/qkv/lora_a", True, Matrix((-3,), (-1,)), hidden=True),  # [D 3 R]
    Kind(r".*/qkv/lora_b", True, TO_HEADS, hidden=True),  # [3 R N K]
    Kind(r".*/out/lora_a", True, FROM_HEADS, hidden=True),  # [N K R]
    Kind(r".*/lora_[ab]", True, LINEAR, hidden=True),  # [D R], [R F]
    Kind(r".*/(token_embedding|positional_embedding|projection)", True, LINEAR),  # [V D], [L D], [D E]
    Kind(r"image/map_pool/probe", True),
    Kind(r".*(bias|scale|class_embedding)", False),
)

# The stacks and single blocks of a tower, in the order in which states go through them.
STACKS = ("blocks", *(f"stage{n}/{part}" for n in (1, 2, 3, 4) for part in ("first", "rest")))
BEFORE_BLOCKS = r"(patch_embed|stem\d|\w+_embedding|pre_norm)(/.*)?"
WITH_LAST_BLOCK = r"post_norm/.*"
BEHIND_BLOCKS = r"(projection|projection_bias|map_pool|attention_pool)(/.*)?"


def flatten(params: Params) -> dict[str, Any]:
    """Returns arrays by path, "image/blocks/mlp/up/kernel"."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(arrays: dict[str, Any]) -> Params:
    """Returns nested dicts; undoes `flatten`."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def by_path(function: Callable, params: Params, *others: Params) -> Params:
    """Returns what a function makes of the path of each array, the array, and those of other trees at its place."""

    def with_path(keys: tuple, *leaves: Any) -> Any:
        return function(jax.tree_util.keystr(keys, simple=True, separator="/"), *leaves)

    return jax.tree_util.tree_map_with_path(with_path, params, *others)


def kind_of(path: str) -> Kind:
    """Returns the row of the table for a parameter."""
    for kind in KINDS:
        if re.fullmatch(kind.pattern, path):
            return kind
    raise AssertionError(f"the table of kinds has no row for the parameter {path}")


def is_adapter(path: str) -> bool:
    """Returns whether a parameter is a part of LoRA's (arXiv 2106.09685): beside it nothing is trained."""
    return path.endswith(("/lora_a", "/lora_b"))


def layers_of(tower: Params) -> dict[str, np.ndarray]:
    """Returns the layer of each parameter of a tower, by its path in the tower; of a stack [depth], that of each block.

    0 has what comes before the blocks; then there is one for each block, the last with the norm behind it; then one for
    what makes the embedding of the last states, where there is such a thing.
    """
    shapes = flatten(tower)
    layers, blocks = {}, 0
    for stack in STACKS:
        within = {path: x for path, x in shapes.items() if path.startswith(f"{stack}/")}
        if within and stack.endswith("first"):
            layers |= dict.fromkeys(within, np.array(blocks + 1))
            blocks += 1
        elif within:
            depth = next(iter(within.values())).shape[0]
            layers |= dict.fromkeys(within, blocks + 1 + np.arange(depth))
            blocks += depth
    places = ((BEFORE_BLOCKS, 0), (WITH_LAST_BLOCK, blocks), (BEHIND_BLOCKS, blocks + 1))
    for path in shapes.keys() - layers.keys():
        [layer] = [layer for pattern, layer in places if re.fullmatch(pattern, path)]
        layers[path] = np.array(layer)
    return layers
