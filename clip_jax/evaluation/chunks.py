"""Several arrays as one, for what is too large to be held: features lie in chunks, and are mapped into memory."""

from collections.abc import Sequence

import numpy as np

from clip_jax.typing import Float, Int


class Chunks:
    """The rows of several arrays as one array's; they are read when they are asked for."""

    def __init__(self, parts: Sequence[Float[np.ndarray, "_ E"]]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape, self.dtype = (int(self._ends[-1]), parts[0].shape[1]), parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | np.integer | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns a row [E], or rows [n, E]; an array may be of numbers, or say of every row whether it is wanted.

        Raises:
            IndexError: there is no such row.
        """
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise IndexError(f"{rows.shape} truths for {len(self)} rows")
            rows = np.flatnonzero(rows)
        rows = rows.astype(np.int64) if rows.size == 0 else rows
        wanted = np.atleast_1d(rows)
        if wanted.size and not -len(self) <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"row {rows} of {len(self)}" if rows.ndim == 0 else f"rows outside of {len(self)}")
        found = self._taken(np.where(wanted < 0, wanted + len(self), wanted))
        return found[0] if rows.ndim == 0 else found

    def _taken(self, rows: Int[np.ndarray, " n"]) -> np.ndarray:
        part_of = np.searchsorted(self._ends, rows, "right")
        found = np.empty((len(rows), self.shape[1]), self.dtype)
        for i in np.unique(part_of).tolist():
            here = part_of == i
            found[here] = self._parts[i][rows[here] - (self._ends[i] - len(self._parts[i]))]
        return found
