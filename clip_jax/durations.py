"""How long a run, its warm-up and its cool-down are: "5000 steps", "400M examples", "32 epochs"."""

import math
import re

from clip_jax.errors import UserError

_NUMBER = r"\d[\d_,]*(?:\.\d+)?|\.\d+"
_WRITTEN = re.compile(rf"({_NUMBER})\s*([kMB]?)\s*(?:(step|example|epoch)s?)?")
_LARGE = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
_EXAMPLES = "write it as '5000 steps', '400M examples' or '32 epochs'"


def parse(duration: str, name: str) -> tuple[float, str]:
    """Returns (how many, of what): of "step", "example" or "epoch"; a bare number is of steps.

    Raises:
        UserError: it is not written so; the words begin with the field's name.
    """
    written = _WRITTEN.fullmatch(duration.strip())
    if written is None:
        raise UserError(f"{name}={duration!r} is no duration: {_EXAMPLES}")
    number, large, unit = written.groups()
    return float(number.replace("_", "").replace(",", "")) * _LARGE[large], unit or "step"


def steps(duration: str, name: str, *, global_batch: int, records: int | None) -> int:
    """Returns how many steps a duration has, the last one perhaps longer than it; of `records` in an epoch.

    Raises:
        UserError: it is no duration, or one of epochs of unknown length.
    """
    number, unit = parse(duration, name)
    if unit == "epoch" and records is None:
        raise UserError(f"{name}={duration!r}: the length of an epoch is the data's, which is not known here")
    examples_in = {"step": global_batch, "example": 1, "epoch": records}
    return math.ceil(number * examples_in[unit] / global_batch)
