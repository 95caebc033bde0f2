"""Steps that went wrong, with their records: updates that were skipped because something was not finite, and losses
that jumped.

Every process sees the same numbers and comes to the same end; the first writes them down, one JSON object a line.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from clip_jax.files import AnyPath
from clip_jax.training.step_lines import StepLines

WINDOW = 100  # finite losses before a step, by which it is judged
FEWEST = 20  # of them, below which nothing is judged
SPIKE = 6  # deviations above the median
LEAST_DEVIATION = 0.02  # of the median: where losses hardly differ, every one would be far off
TO_DEVIATION = 1.4826  # from the median of the distances to the median, where these are normally distributed

Records = dict[str, list[int]]  # what a global batch is made of: indices into the source, by shard


class _Unread(NamedTuple):
    """A step's results that nobody has waited for yet."""

    step: int
    loss: jax.Array
    finite: jax.Array


class Incidents:
    """Sees every step's loss, and reads it only when the host waits for the devices anyway."""

    def __init__(
        self, path: AnyPath | None, records: Callable[[int], Records], limit: int, state: dict[str, Any] | None
    ):
        """Writes to `path`, and goes on from what `state` gave. `records` gives those of a step; `limit` is of updates
        that are skipped in a row."""
        state = state or {"step": 0, "losses": [], "row": [], "skipped": 0}
        self._records, self._limit = records, limit
        self._lines = None if path is None else StepLines(path, resumed_at=state["step"])
        self._unread: list[_Unread] = []
        self._step: int = state["step"]  # the last that was read
        self._losses: list[float] = state["losses"]
        self._row: list[int] = state["row"]  # the steps, one after the other, whose updates were skipped last
        self._long_row: list[int] | None = None  # that reached the limit, whatever came behind it
        self.skipped: int = state["skipped"]  # updates, in the whole run

    def dispatched(self, step: int, loss: jax.Array, finite: jax.Array) -> None:
        """Notes that a step has begun, of which these will be the results."""
        self._unread.append(_Unread(step, loss, finite))

    def read(self, say: Callable[[str], None]) -> None:
        """Judges all steps so far; waits until they are done."""
        unread, self._unread = jax.device_get(self._unread), []
        for step, loss, finite in unread:
            self._step = step
            if finite:
                self._row = []
                self._judge(step, float(loss), say)
            else:
                self.skipped += 1
                self._row.append(step)
                if len(self._row) >= self._limit:
                    self._long_row = self._row
                self._write(step, "skipped", loss=float(loss))
                say(f"step {step}: loss or gradients are not finite; its update is skipped")

    def _judge(self, step: int, loss: float, say: Callable[[str], None]) -> None:
        """Notes a loss that is far above the last ones."""
        if len(self._losses) >= FEWEST:
            usual = float(np.median(self._losses))
            deviation = TO_DEVIATION * float(np.median(np.abs(np.subtract(self._losses, usual))))
            if loss > usual + SPIKE * max(deviation, LEAST_DEVIATION * abs(usual)):
                self._write(step, "spike", loss=loss, usual=usual)
                say(f"step {step}: the loss jumped to {loss:.4f} from about {usual:.4f}")
        self._losses = [*self._losses, loss][-WINDOW:]

    def _write(self, step: int, kind: str, **numbers: float) -> None:
        if self._lines is not None:
            self._lines.write({"step": step, "kind": kind, **numbers, "records": self._records(step)})

    def too_many(self) -> str | None:
        """Returns what is to be said when the limit of skipped updates in a row was reached, at any step so far."""
        if self._long_row is None:
            return None
        return (
            f"loss or gradients were not finite from step {self._long_row[0]} on: {len(self._long_row)} updates in a "
            f"row were skipped (skip_limit={self._limit}); their records are in the run's incidents.jsonl; lower "
            "optim.learning_rate, clip gradients (optim.clip_norm), compute in float32, or look at the data"
        )

    def state(self) -> dict[str, Any]:
        """Returns what a run that goes on from here has to know, as plain JSON values; the lines before are there."""
        if self._lines is not None:
            self._lines.flush()
        return {"step": self._step, "losses": self._losses, "row": self._row, "skipped": self.skipped}

    def __enter__(self) -> "Incidents":
        return self

    def __exit__(self, *error) -> None:
        if self._lines is not None:
            self._lines.close()
