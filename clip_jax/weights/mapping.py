"""Tables that say which tensor of a foreign file is which of our arrays: read forwards to import, backwards to export.

A table is complete or it is an error. Importing names every tensor that no rule takes, every one that is missing and
every one of another shape, all at once; one of our arrays that no rule fills is a mistake in the table.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import UserError
from clip_jax.models.clip import Weights
from clip_jax.sharding import path_of

LONGEST_LIST = 20  # names in an error; a file of something else has thousands
ALIGNMENT = 64  # bytes; what lies at a multiple JAX takes over on a CPU without copying it

DType = np.dtype | type


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of theirs, or one a block, and the array of ours, or the part of one, that it fills.

    `{s}` stands for a number in a name, `{i+1}` for one more than it. In square brackets stands which part of our
    array is meant: a letter runs over a dimension, a number is one place in it, `:` is all of it. The pattern is
    einops', in the legend's letters; each of our dimensions has its own letter, so that our shape gives theirs.

        Rule("resblocks.{i}.attn.in_proj_weight", "image/blocks/attention/qkv/kernel[i]", "(T N K) D -> D T N K")
    """

    source: str
    target: str
    pattern: str

    def inside(self, source: str, target: str, part: str = "") -> "Rule":
        """Returns the rule for a module that lies further down, in both namings."""
        return Rule(f"{source}.{self.source}", f"{target}/{self.target}{part}", self.pattern)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The part of one of our arrays that one tensor of theirs fills."""

    path: str
    index: tuple[int | slice, ...]
    pattern: str

    def ours(self, array: np.ndarray) -> np.ndarray:
        """Returns a view of the part."""
        return array[(*self.index, ...)]  # the dots keep a scalar an array

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """Returns the part as they have it, a view where that is possible."""
        left, right = self.pattern.split("->")
        return einops.rearrange(self.ours(array), f"{right}->{left}")

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that their tensor has when our array has `shape`."""
        return self.theirs(np.broadcast_to(np.int8(0), shape)).shape

    def fill(self, array: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the tensor into the part, in the array's dtype."""
        part = self.ours(array)
        sizes = einops.parse_shape(part, self.pattern.split("->")[1])
        part[...] = einops.rearrange(tensor, self.pattern, **sizes)

    def order(self, array: Any) -> Sequence[int]:
        """Returns our array's dimensions in the order that they have in their file: to fill it is then a plain copy."""
        left, right = (re.findall(r"[A-Z]\w*", side) for side in self.pattern.split("->"))
        stacked = len(self.index)
        if slice(None) in self.index or stacked + len(right) != array.ndim:
            return range(array.ndim)
        return [*range(stacked), *(stacked + right.index(letter) for letter in left)]


def flatten(weights: Weights) -> dict[str, Any]:
    """Returns parameters and statistics in one dict, by paths such as "image/stage2/rest/conv1/norm/mean"."""
    return {path_of(keys): x for tree in weights for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(arrays: Mapping[str, Any], shapes: Weights) -> Weights:
    """Returns the arrays in the trees of `shapes`."""
    return Weights(*(jax.tree_util.tree_map_with_path(lambda keys, _: arrays[path_of(keys)], tree) for tree in shapes))


def source_shapes(rules: Sequence[Rule], shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that a file's tensors must have, by their names, for our arrays to have `shapes`."""
    return {name: slot.their_shape(shapes[slot.path].shape) for name, slot in _slots(rules, shapes).items()}


def import_tensors(
    rules: Sequence[Rule], tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], dtype: DType | None = None
) -> dict[str, np.ndarray]:
    """Returns our arrays, filled from a file's tensors.

    Floats come in `dtype`, or where that is None in the dtype of their source: where several tensors fill one array,
    in one that holds all of theirs. Integers come in the dtype of `shapes`.

    Raises:
        UserError: tensors that no rule takes, that are missing, that have another shape, or integers that do not fit;
            all of them.
    """
    slots = _slots(rules, shapes)
    _check(tensors, slots, shapes)
    sources: dict[str, list[np.dtype]] = {path: [] for path in shapes}
    for name, slot in slots.items():
        sources[slot.path].append(tensors[name].dtype)
    orders = {slot.path: slot.order(shapes[slot.path]) for slot in slots.values()}
    arrays = {}
    for path, like in shapes.items():
        found = functools.reduce(jnp.promote_types, sources[path]) if dtype is None else dtype
        arrays[path] = _empty(like.shape, found if _is_float(like.dtype) else like.dtype, orders[path])
    for name, slot in slots.items():
        slot.fill(arrays[slot.path], tensors[name])
    return arrays


def export_tensors(rules: Sequence[Rule], arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a file's tensors made of our arrays, sorted by name; floats keep their dtype, integers are int64."""
    arrays = {path: np.asarray(x) for path, x in arrays.items()}
    tensors = {name: slot.theirs(arrays[slot.path]) for name, slot in _slots(rules, arrays).items()}
    in_order = sorted(tensors.items(), key=lambda item: re.sub(r"\d+", lambda number: number[0].zfill(9), item[0]))
    return {name: x if _is_float(x.dtype) else x.astype(np.int64) for name, x in in_order}


def _slots(rules: Sequence[Rule], shapes: Mapping[str, Any]) -> dict[str, _Slot]:
    """Returns what each of their names fills; every element of ours is filled once, or the table is wrong."""
    matches = [match for rule in rules for match in _matches(rule, shapes)]
    slots = dict(matches)
    assert len(slots) == len(matches), "two rules take the same name"
    assert len({(slot.path, str(slot.index)) for slot in slots.values()}) == len(slots), "two names fill the same part"
    filled = dict.fromkeys(shapes, 0)
    for slot in slots.values():
        filled[slot.path] += math.prod(slot.their_shape(shapes[slot.path].shape))
    wrong = [path for path, like in shapes.items() if filled[path] != math.prod(like.shape)]
    assert not wrong, f"arrays that the rules do not fill, or fill twice: {', '.join(wrong)}"
    return slots


def _matches(rule: Rule, shapes: Mapping[str, Any]) -> Iterator[tuple[str, _Slot]]:
    """Yields each name that a rule stands for, and the slot that the tensor fills."""
    template, _, part = rule.target.rstrip("]").partition("[")
    letters = [letter.strip() for letter in part.split(",")] if part else []
    expression = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", template))
    for path, like in shapes.items():
        if found := expression.fullmatch(path):
            choices = [_choices(letter, size) for letter, size in zip(letters, like.shape[: len(letters)], strict=True)]
            for index in itertools.product(*choices):
                numbers = found.groupdict() | dict(zip(letters, index, strict=True))
                yield _named(rule.source, numbers), _Slot(path, index, rule.pattern)


def _choices(letter: str, size: int) -> Sequence[int | slice]:
    """Returns the places along one dimension that a letter, a number or ":" in square brackets stands for."""
    if letter == ":":
        return [slice(None)]
    return [int(letter)] if letter.isdigit() else range(size)


def _named(source: str, numbers: Mapping[str, Any]) -> str:
    return re.sub(r"\{(\w+)(?:\+(\d+))?\}", lambda word: str(int(numbers[word[1]]) + int(word[2] or 0)), source)


def _check(tensors: Mapping[str, np.ndarray], slots: Mapping[str, _Slot], shapes: Mapping[str, Any]) -> None:
    """Raises UserError with all that keeps the tensors from filling the slots."""

    def mismatch(name: str, slot: _Slot) -> str | None:
        tensor, like = tensors[name], shapes[slot.path]
        shape = slot.their_shape(like.shape)
        if tensor.shape == shape and _is_float(tensor.dtype) == _is_float(like.dtype):
            return None if _is_float(like.dtype) else too_large(name, tensor, like.dtype)
        kind = "float" if _is_float(like.dtype) else "int"
        return f"{name} is {tensor.dtype} {list(tensor.shape)}, not {kind} {list(shape)}"

    def too_large(name: str, tensor: np.ndarray, dtype: np.dtype) -> str | None:
        furthest = max((int(n) for n in (tensor.min(initial=0), tensor.max(initial=0))), key=abs)
        limits = np.iinfo(dtype)
        return None if limits.min <= furthest <= limits.max else f"{name} has {furthest}, which {dtype} cannot hold"

    mismatches = [mismatch(name, slot) for name, slot in slots.items() if name in tensors]
    problems = {
        "missing": [name for name in slots if name not in tensors],
        "not known": [name for name in tensors if name not in slots],
        "of another shape or kind": [problem for problem in mismatches if problem],
    }
    if any(problems.values()):
        lists = [f"{what} ({len(found)}): {listed(found)}" for what, found in problems.items() if found]
        raise UserError(f"its tensors do not fit; {'; '.join(lists)}")


def listed(names: Sequence[str]) -> str:
    """Returns the names in one line, the first few where there are many."""
    more = len(names) - LONGEST_LIST
    return ", ".join(names[:LONGEST_LIST]) + (f" and {more} more" if more > 0 else "")


def _is_float(dtype: DType) -> bool:
    return jnp.issubdtype(dtype, np.floating)  # NumPy's own does not know bfloat16


def _empty(shape: tuple[int, ...], dtype: DType, order: Sequence[int]) -> np.ndarray:
    """Returns an array of anything whose dimensions lie in memory in this order, the last one closest.

    Aligned for JAX (measured: 100 MB go to the CPU device in 0.3 ms, not in 48).
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    in_memory = memory[start : start + size].view(dtype).reshape([shape[axis] for axis in order])
    return in_memory.transpose(np.argsort(order))
