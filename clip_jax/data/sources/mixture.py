"""Sources put together: a range of one, several as one, several in fixed proportions."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from clip_jax.data.sources.source import Inventory, Record, Source
from clip_jax.errors import UserError

MOST_SLOTS = 10_000  # of a cycle, in which the proportions are kept exactly


class Range:
    """The records of a source from one index to another."""

    def __init__(self, source: Source, start: int | None, stop: int | None):
        first, last, _ = slice(start, stop).indices(len(source))
        if first >= last:
            raise UserError(f"[{_word(start)}:{_word(stop)}] leaves nothing of the {len(source):,} records")
        self.name, self.split = source.name, source.split
        self.classnames, self.templates = source.classnames, source.templates
        self._source, self._first, self._length = source, first, last - first

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return self._source[self._first + index]

    def shard_of(self, index: int) -> str:
        return self._source.shard_of(self._first + index)

    def fingerprint(self) -> dict[str, Any]:
        return self._source.fingerprint() | {"range": [self._first, self._first + self._length]}

    def inventory(self) -> Inventory:
        """Returns what the whole source has, without what nobody has counted for the range."""
        whole = self._source.inventory()
        return Inventory(shards=whole.shards, broken=whole.broken)


def _word(bound: int | None) -> str:
    return "" if bound is None else str(bound)


class Mixture:
    """Several sources as one: their records one after the other, and how often each source has its turn.

    Without weights all records are equal, and an epoch has each once. With weights each source has its own epochs.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[Fraction] | None):
        self.name, self.split = "+".join(source.name for source in sources), "all"
        self.classnames, self.templates = (), ()
        self.lengths = tuple(len(source) for source in sources)
        self.turns = None if weights is None else _whole(weights)  # of each source, in a cycle
        self._sources, self._names = tuple(sources), _told_apart([source.name for source in sources])
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """Returns (source, index in it)."""
        place = int(np.searchsorted(self._ends, index, "right"))
        return place, index - (int(self._ends[place - 1]) if place else 0)

    def __getitem__(self, index: int) -> Record:
        place, inner = self._place(index)
        return self._sources[place][inner]

    def shard_of(self, index: int) -> str:
        place, inner = self._place(index)
        return f"{self._names[place]}/{self._sources[place].shard_of(inner)}"

    def fingerprint(self) -> dict[str, Any]:
        parts = {f"part {i}": source.fingerprint() for i, source in enumerate(self._sources, 1)}
        return parts | {"turns": self.turns and list(self.turns)}

    def inventory(self) -> Inventory:
        inventories = [source.inventory() for source in self._sources]
        return Inventory.of_all(dict(zip(self._names, inventories, strict=True)))


def _told_apart(names: Sequence[str]) -> list[str]:
    """Returns the names, with a number where several are equal."""
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _whole(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Returns the smallest whole numbers in the proportions of the weights.

    Raises:
        UserError: they are so large that an exact cycle would be longer than MOST_SLOTS.
    """
    least = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * least) for weight in weights]
    turns = tuple(turn // math.gcd(*whole) for turn in whole)
    if sum(turns) > MOST_SLOTS:
        raise UserError(
            f"the weights {', '.join(str(float(weight)) for weight in weights)} repeat exactly after {sum(turns):,} "
            f"examples only, more than {MOST_SLOTS:,}; round them"
        )
    return turns
