"""What to change when a run does not fit, and the largest batch that does: as few compilations as possible.

Everything here goes by a function that makes a plan of a config. A compilation takes minutes, so the next batch is
never guessed blindly: memory grows with the batch nearly as a straight line, and a refusal says by how much, too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from clip_jax.checked import build
from clip_jax.config import Config
from clip_jax.errors import UserError
from clip_jax.planning.plan import Plan

Planner = Callable[[Config], Plan]
CLOSE = 1 / 32  # the search ends when a batch so little larger is known not to fit
REMAT = ("attention", "full")  # policies by how much they compute again; any other computes less
TRUSTED = 5  # plans; when the straight line has not found the answer by then, intervals are halved


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Fields to change, and what came of it."""

    changes: dict[str, Any]  # dotted path → value
    plan: Plan

    def flags(self) -> str:
        """Returns the changes as they are written on a command line."""
        return " ".join(f"--config.{path}={value}" for path, value in self.changes.items())


def remedies(config: Config, plan: Plan, make: Planner) -> Iterator[Remedy]:
    """Yields what was tried, each with what was tried before it; the last one fits, or nothing more can be done.

    In the order of what they cost: to compute activations again, first all but attention, is a third more work at most;
    to split parameters and optimiser over the chips is traffic; a microbatch is another forward pass. Where parameters
    and optimiser leave no room for anything, to split them is the first.
    """
    again, split = _policies(config), _splits(plan)
    changes: dict[str, Any] = {}
    for alternatives in (split, *again) if _no_room(plan) else (*again, split):
        remedy = _first(config, changes, alternatives, make)
        if remedy is None:
            continue
        yield remedy
        if remedy.plan.fits:
            return
        changes, plan = remedy.changes, remedy.plan
    for microbatch in microbatches(plan):
        tried = changes | {"microbatch": microbatch}
        remedy = Remedy(tried, make(with_changes(config, tried)))
        yield remedy
        if remedy.plan.fits:
            return


def _first(config: Config, changes: dict[str, Any], alternatives: list[dict[str, Any]], make: Planner) -> Remedy | None:
    """Returns what comes of the first alternative that goes together with the model; None: none does."""
    for alternative in alternatives:
        tried = changes | alternative
        try:
            return Remedy(tried, make(with_changes(config, tried)))
        except UserError:  # a width that so many chips cannot split
            continue
    return None


def with_changes(config: Config, changes: dict[str, Any]) -> Config:
    """Returns the config with the fields changed, checked anew."""
    values = dataclasses.asdict(config)
    for path, value in changes.items():
        *parents, name = path.split(".")
        functools.reduce(dict.__getitem__, parents, values)[name] = value
    return build(Config, values)


def _policies(config: Config) -> list[list[dict[str, Any]]]:
    """Returns the policies that compute more again than the config's."""
    after = REMAT[REMAT.index(config.model.remat) + 1 :] if config.model.remat in REMAT else REMAT
    return [[{"model.remat": policy}] for policy in after]


def _splits(plan: Plan) -> list[dict[str, Any]]:
    """Returns the meshes that split parameters further, the furthest first."""
    ways = plan.mesh["data"] * plan.mesh["fsdp"]
    fsdp = [n for n in range(ways, plan.mesh["fsdp"], -1) if ways % n == 0]
    return [{"mesh.data": ways // n, "mesh.fsdp": n} for n in fsdp]


def _no_room(plan: Plan) -> bool:
    """Returns whether parameters, their gradients and the optimiser fill a chip."""
    return 2 * plan.memory.parameters + plan.memory.optimizer > plan.memory.limit


def microbatches(plan: Plan) -> Iterator[int]:
    """Yields smaller microbatches: the first by how much the activations have to shrink, then halves."""
    memory, ways = plan.memory, plan.global_batch // plan.rows
    room = memory.limit - (memory.used - memory.temporaries)
    rows = plan.rows if plan.microbatch is None else plan.microbatch // ways
    if room <= 0:
        return  # parameters and optimiser alone are too large
    wanted = rows * min(room / max(memory.temporaries, 1), 0.5)
    while wanted >= 1:
        fitting = max(n for n in range(1, math.floor(wanted) + 1) if plan.rows % n == 0)
        yield fitting * ways
        wanted = fitting / 2


def find_batch(config: Config, first: Plan, make: Planner) -> Iterator[Plan]:
    """Yields the plans made on the way to the largest batch that fits, `first` included; `largest` picks it out."""
    ways = first.mesh["data"] * first.mesh["fsdp"]
    unit = config.microbatch // ways if config.microbatch else (8 if first.rows >= 8 else 1)
    config = with_changes(config, {"loss.tile": None})  # a given one need not fit into a smaller block
    yield first
    tried = {first.rows: first}
    while (rows := next_rows(tried, unit)) is not None:
        plan = make(with_changes(config, {"data.global_batch": rows * ways}))
        tried[rows] = plan
        yield plan


def largest(plans: list[Plan]) -> Plan | None:
    """Returns the plan with the most pairs of those that fit."""
    return max((plan for plan in plans if plan.fits), key=lambda plan: plan.global_batch, default=None)


def next_rows(tried: dict[int, Plan], unit: int) -> int | None:
    """Returns which number of pairs a chip to try next, a multiple of `unit`; None when the answer is known."""
    fitting = max((rows for rows, plan in tried.items() if plan.fits), default=0)
    refused = min((rows for rows, plan in tried.items() if not plan.fits), default=None)
    if refused is None:
        guess = min(expected(tried), 8 * fitting)  # one plan's straight line is not to be trusted further
        return max(_whole(guess, unit), fitting + unit)
    if refused - fitting <= max(unit, refused * CLOSE):
        return None
    guess = _whole(expected(tried) if len(tried) < TRUSTED else (fitting + refused) / 2, unit)
    return min(max(guess, _whole(fitting, unit) + unit), _whole(refused - 1, unit)) or None


def _whole(rows: int | float, unit: int) -> int:
    return int(rows // unit * unit)


def expected(tried: dict[int, Plan]) -> int | float:
    """Returns the number of pairs a chip that would just fit, if memory grew along a line.

    The line goes through the two plans nearest to the limit; of one alone it begins at parameters and optimiser.
    """
    nearest = sorted(tried.items(), key=lambda item: abs(item[1].memory.spare))[:2]
    memory = nearest[0][1].memory
    points = [(rows, plan.memory.used) for rows, plan in nearest]
    if len(points) == 1:
        points.append((0, memory.parameters + memory.optimizer))
    (rows, used), (other, less) = points
    slope = (used - less) / (rows - other)
    if slope <= 0:
        return 2 * max(rows, other)
    return rows + (memory.limit - used) / slope
