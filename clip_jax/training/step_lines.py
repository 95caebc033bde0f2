"""A file of one JSON object a line, each about a step; a run that goes on from a step takes back what came after it."""

import json
import math
from typing import Any

from clip_jax.errors import UserError
from clip_jax.files import AnyPath, write_text
from clip_jax.training.growing import growing


class StepLines:
    """Appends lines to a file."""

    def __init__(self, path: AnyPath, *, resumed_at: int):
        """Opens the file, and drops the lines after a step: the run goes on from there and will write them again.

        Raises:
            UserError: it cannot be written; so does `write`.
        """
        self.path = path
        if path.exists():
            kept = [line for line in read_lines(path) if line["step"] <= resumed_at]
            write_text(path, "".join(map(_text, kept)))
        self._file = growing(path)

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line, at once: a killed run keeps what it logged. A number that is not finite is null."""
        self._file.write(_text(line).encode())

    def flush(self) -> None:
        """Returns when all lines are there, in a bucket too."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: AnyPath) -> list[dict[str, Any]]:
    """Returns all lines; what a kill or a power cut has left at the end, and is none, is left out.

    Raises:
        UserError: a line before is none; says which.
    """
    lines, cut = [], None
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            cut = cut or f"{path}: line {number} is damaged ({error}); remove it, and start again"
            continue
        if cut:
            raise UserError(cut)
        lines.append(line)
    return lines


def _text(line: dict[str, Any]) -> str:
    """Returns strict JSON, which has no word for NaN."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
