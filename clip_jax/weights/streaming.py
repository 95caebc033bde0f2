"""Arrays that go from one file to another without being held all at once.

A `Lazy` mapping makes an array when it is asked for; writers take one after the other, in pieces; and the pages of a
mapped file that have been read are given back. A conversion then needs the memory of its largest array.
"""

import mmap
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

PIECE = 16 << 20  # bytes
DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)  # not every platform has it

Make = Callable[[Sequence[str]], Iterator[np.ndarray]]  # names of a group → their arrays, in turn
Group = tuple[Sequence[str], Make]


class Lazy(Mapping[str, np.ndarray]):
    """Arrays by name, made anew whenever they are asked for and kept by nobody.

    `specs` says the shape and dtype of each and makes none. What is cut out of one whole is a group: `items()` makes
    that whole once, so it goes group by group, which need not be the order of the names.
    """

    def __init__(self, specs: Mapping[str, Any], groups: Sequence[Group]):
        self.specs = specs
        self._groups = groups
        self._make = {name: make for names, make in groups for name in names}
        assert self._make.keys() == specs.keys()

    def __getitem__(self, name: str) -> np.ndarray:
        return next(self._make[name]([name]))

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __or__(self, other: Mapping[str, np.ndarray]) -> "Lazy":
        return _joined(self, other)

    def __ror__(self, other: Mapping[str, np.ndarray]) -> "Lazy":
        return _joined(other, self)

    def items(self) -> ItemsView[str, np.ndarray]:
        """Returns the pairs; whoever goes through them should let go of one array before the next."""
        return _Items(self)

    def groups(self) -> Sequence[Group]:
        """Returns which arrays are cut out of one whole, and what makes them."""
        return self._groups


class _Items(ItemsView):
    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for names, make in self._mapping.groups():
            yield from zip(names, make(names), strict=True)


def specs_of(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what has the shapes and dtypes of the arrays, by their names; none is made."""
    return arrays.specs if isinstance(arrays, Lazy) else arrays


def raw(x: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the bytes of an array in C order; where they lie otherwise in memory, some rows at a time are copied."""
    rows = len(x) if x.ndim and not x.flags.c_contiguous else 1
    step = max(1, rows * PIECE // max(1, x.nbytes))
    for start in range(0, rows, step):
        piece = x[start : start + step] if rows > 1 else x
        yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8)


def give_back(x: np.ndarray | memoryview) -> None:
    """Frees the memory that a mapped file's pages take, where `x` is a view of one; who reads on gets them again."""
    base: Any = x
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if base is not None and DONT_NEED is not None and memoryview(base).readonly:  # what is written to could be lost
        base.madvise(DONT_NEED)


def _joined(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> Lazy:
    """Returns the arrays of both; of those with one name the second's."""
    kept = [([name for name in names if name not in second], make) for names, make in _groups_of(first)]
    groups = [*(group for group in kept if group[0]), *_groups_of(second)]
    return Lazy({**specs_of(first), **specs_of(second)}, groups)


def _groups_of(arrays: Mapping[str, np.ndarray]) -> Sequence[Group]:
    if isinstance(arrays, Lazy):
        return arrays.groups()
    return [(list(arrays), lambda names: (arrays[name] for name in names))]
