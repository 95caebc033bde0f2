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
from clip_jax.weights.streaming import Lazy, give_back, specs_of

LONGEST_LIST = 20  # names in an error; a file of something else has thousands
ALIGNMENT = 64  # bytes; what lies at a multiple JAX takes over on a CPU without copying it

DType = np.dtype | type


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of theirs, or one a block, and the array of ours, or the part of one, that it fills.

    `{s}` stands for a number in a name, `{i+1}` for one more than it. In square brackets stands which part of our
    array is meant: a letter runs over a dimension, a number is one place in it, `:` is all of it, `1:` all but the
    first place. The pattern is einops', in the legend's letters; each of our dimensions that is not taken apart has its
    own letter, so that our shape gives theirs.

        Rule("resblocks.{i}.attn.in_proj_weight", "image/blocks/attention/qkv/kernel[i]", "(T N K) D -> D T N K")
        Rule("attn_pool.kv.weight", "image/map_pool/qkv/kernel[:, 1:]", "(T N K) D -> D T N K")
        Rule("logit_scale", "logit_scale", "1 ->")
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
        placed = [axis for axis, place in enumerate(self.index) if isinstance(place, int)]
        rest = [axis for axis in range(array.ndim) if axis not in placed]
        if len(right) != len(rest):  # dots stand for some
            return range(array.ndim)
        return [*placed, *(rest[right.index(letter)] for letter in left)]


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
) -> Lazy:
    """Returns our arrays, each filled from a file's tensors when it is asked for; all is checked before.

    Floats come in `dtype`, or where that is None in the dtype of their source: where several tensors fill one array,
    in one that holds all of theirs. Integers come in the dtype of `shapes`.

    Raises:
        UserError: tensors that no rule takes, that are missing, that have another shape, or integers that do not fit;
            all of them.
    """
    slots = _slots(rules, shapes)
    _check(tensors, slots, shapes)
    theirs, sources = specs_of(tensors), _by_path(slots)
    specs = {}
    for path, like in shapes.items():
        found = functools.reduce(jnp.promote_types, [theirs[name].dtype for name in sources[path]])
        found = found if dtype is None else dtype
        specs[path] = jax.ShapeDtypeStruct(like.shape, found if _is_float(like.dtype) else like.dtype)

    def make(paths: Sequence[str]) -> Iterator[np.ndarray]:
        for path in paths:
            yield _filled(specs[path], {name: slots[name] for name in sources[path]}, tensors)

    return Lazy(specs, [([path], make) for path in specs])


def export_tensors(rules: Sequence[Rule], arrays: Mapping[str, Any]) -> Lazy:
    """Returns a file's tensors, each cut out of our arrays when it is asked for; floats keep their dtype, integers
    become int64. Their names are sorted; one of our arrays after the other is needed to make them in turn."""
    ours = specs_of(arrays)
    slots = _slots(rules, ours)
    in_order = sorted(slots.items(), key=lambda item: _natural(item[0]))
    specs = {name: _exported(slot, ours[slot.path]) for name, slot in in_order}

    def make(names: Sequence[str]) -> Iterator[np.ndarray]:
        array = np.asarray(arrays[slots[names[0]].path])
        for name in names:
            yield slots[name].theirs(array).astype(specs[name].dtype, copy=False)

    return Lazy(specs, [(names, make) for names in _by_path(slots).values()])


def _filled(spec: jax.ShapeDtypeStruct, slots: Mapping[str, _Slot], tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns one of our arrays, made of the tensors that fill it."""
    array = _empty(spec.shape, spec.dtype, next(iter(slots.values())).order(spec))
    for name, slot in slots.items():
        tensor = tensors[name]
        slot.fill(array, tensor)
        give_back(tensor)
    return array


def _exported(slot: _Slot, like: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of the tensor that is cut out of one of our arrays."""
    return jax.ShapeDtypeStruct(slot.their_shape(like.shape), like.dtype if _is_float(like.dtype) else np.int64)


def _by_path(slots: Mapping[str, _Slot]) -> dict[str, list[str]]:
    """Returns the names of theirs that fill each of our arrays."""
    names: dict[str, list[str]] = {}
    for name, slot in slots.items():
        names.setdefault(slot.path, []).append(name)
    return names


def _natural(name: str) -> str:
    """Returns what puts names into the order of the numbers in them."""
    return re.sub(r"\d+", lambda number: number[0].zfill(9), name)


def _slots(rules: Sequence[Rule], shapes: Mapping[str, Any]) -> dict[str, _Slot]:
    """Returns what each of their names fills; every element of ours is filled once, or the table is wrong."""
    matches = [match for rule in rules for match in _matches(rule, shapes)]
    slots = dict(matches)
    assert len(slots) == len(matches), "two rules take the same name"
    names = _by_path(slots)
    wrong = [
        path
        for path, like in shapes.items()
        if not _is_filled(like.shape, [slots[name] for name in names.get(path, [])])
    ]
    assert not wrong, f"arrays that the rules do not fill, or fill twice: {', '.join(wrong)}"
    return slots


def _is_filled(shape: tuple[int, ...], slots: Sequence[_Slot]) -> bool:
    """Returns whether the slots fill each place of an array of this shape once."""
    whole = [all(slot.index[axis : axis + 1] in ((), (slice(None),)) for slot in slots) for axis in range(len(shape))]
    times = np.zeros([1 if is_whole else size for size, is_whole in zip(shape, whole, strict=True)], np.int32)
    for slot in slots:
        times[slot.index] += 1
        slot.their_shape(shape)  # that the pattern fits the part
    return bool((times == 1).all())


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
    """Returns the places along one dimension that a letter, a number or a slice in square brackets stands for."""
    if ":" in letter:
        return [slice(*(int(end) if end else None for end in letter.split(":")))]
    return [int(letter)] if letter.isdigit() else range(size)


def _named(source: str, numbers: Mapping[str, Any]) -> str:
    return re.sub(r"\{(\w+)(?:\+(\d+))?\}", lambda word: str(int(numbers[word[1]]) + int(word[2] or 0)), source)


def _check(tensors: Mapping[str, np.ndarray], slots: Mapping[str, _Slot], shapes: Mapping[str, Any]) -> None:
    """Raises UserError with all that keeps the tensors from filling the slots."""
    theirs = specs_of(tensors)

    def mismatch(name: str, slot: _Slot) -> str | None:
        spec, like = theirs[name], shapes[slot.path]
        shape = slot.their_shape(like.shape)
        if spec.shape == shape and _is_float(spec.dtype) == _is_float(like.dtype):
            return None if _is_float(like.dtype) else too_large(name, like.dtype)
        kind = "float" if _is_float(like.dtype) else "int"
        return f"{name} is {spec.dtype} {list(spec.shape)}, not {kind} {list(shape)}"

    def too_large(name: str, dtype: np.dtype) -> str | None:
        tensor, limits = tensors[name], np.iinfo(dtype)
        furthest = max((int(n) for n in (tensor.min(initial=0), tensor.max(initial=0))), key=abs)
        return None if limits.min <= furthest <= limits.max else f"{name} has {furthest}, which {dtype} cannot hold"

    mismatches = [mismatch(name, slot) for name, slot in slots.items() if name in theirs]
    problems = {
        "missing": [name for name in slots if name not in theirs],
        "not known": [name for name in theirs if name not in slots],
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
