"""The optimiser: which parameters move, in which direction, and how far.

Directions come from Optax; how far is the learning rate of a step times the factor of a parameter, and is no part of
Optax' state: it goes by the run's own count of steps.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.config import OptimConfig, Steps
from clip_jax.optim.directions import DIRECTIONS
from clip_jax.optim.factors import Factors, factors_of
from clip_jax.optim.parameters import BEFORE_BLOCKS, Params, by_path, flatten, kind_of, unflatten
from clip_jax.optim.schedules import schedule_of


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Splits parameters into what is trained and what is fixed, and moves what is trained.

    A stack of blocks of which some are fixed is trained: its fixed blocks have gradients of 0, and stay as they are.
    """

    transform: optax.GradientTransformation  # gradients → directions, decay included, without a learning rate
    schedule: optax.Schedule  # step → learning rate
    factors: Factors  # of the learning rate, by path; 0: fixed
    ema: float | None = None  # how much of moving averages stays at a step; None: there are none

    def split(self, params: Params) -> tuple[Params, Params]:
        """Returns (trained, fixed); `join` puts them together again."""
        paths = flatten(params)
        fixed = {path: x for path, x in paths.items() if not self.factors[path].any()}
        return unflatten({path: x for path, x in paths.items() if path not in fixed}), unflatten(fixed)

    def trains(self, tower: str) -> bool:
        """Returns whether anything of a tower, "image" or "text", is trained."""
        return any(factor.any() for path, factor in self.factors.items() if path.startswith(f"{tower}/"))

    def fixed_blocks(self, tower: str) -> int:
        """Returns of how many blocks, the first of a tower, nothing is trained, nor before them: no gradient need go
        there. 0 where all of the stack is fixed: `split` takes it away as it is."""
        mine = {path.removeprefix(f"{tower}/"): x for path, x in self.factors.items() if path.startswith(f"{tower}/")}
        if any(factor.any() for path, factor in mine.items() if re.fullmatch(BEFORE_BLOCKS, path)):
            return 0
        stacked = [factor != 0 for path, factor in mine.items() if path.startswith("blocks/")]
        return int(np.argmax(np.any(stacked, axis=0))) if stacked else 0  # a ResNet has no such stack

    def trained_numbers(self, params: Params) -> int:
        """Returns how many numbers are trained; `params` may be shapes."""
        # The numbers of a parameter, or of a block of it, as often as there are factors which are not 0.
        shares = [(x.size // self.factors[path].size, self.factors[path]) for path, x in flatten(params).items()]
        return sum(numbers * int(np.count_nonzero(factor)) for numbers, factor in shares)

    def init(self, trained: Params) -> Any:
        """Returns what Optax keeps of the trained parameters from step to step."""
        return self.transform.init(trained)

    def of_trained(self, gradients: Params) -> Params:
        """Returns gradients that are 0 for the fixed blocks of stacks: what is clipped, and measured."""

        def kept(path: str, x: jax.Array) -> jax.Array:
            factor = self._factor(path, x.ndim)
            return x if factor.all() else jnp.where(factor == 0, 0, x)

        return by_path(kept, gradients)

    def update(self, gradients: Params, state: Any, trained: Params, step: jax.Array | int) -> tuple[Params, Any]:
        """Returns the trained parameters, and what Optax keeps, after a step; gradients are in their shape."""
        directions, state = self.transform.update(self.of_trained(gradients), state, trained)
        rate = self.schedule(step)

        def move(path: str, x: jax.Array, direction: jax.Array) -> jax.Array:
            factor = self._factor(path, x.ndim)
            moved = (x - rate * factor * direction).astype(x.dtype)
            return moved if factor.all() else jnp.where(factor == 0, x, moved)  # -0.0, too, stays what it is

        return by_path(move, trained, directions), state

    def averaged(self, averages: Any, values: Any, step: jax.Array | int) -> Any:
        """Returns the moving averages after a step, which there left these values; both of one shape, or no averages.

        They are quick at first, or what was drawn would stay in them for long: of step t (from 0) min(ema, (1 + t) /
        (10 + t)) stays, as in TensorFlow's `ExponentialMovingAverage`. Numbers that count are taken as they are.
        """
        if self.ema is None:
            return averages
        moves = 1 - jnp.minimum(self.ema, (1 + step) / (10 + step))

        def move(average: jax.Array, value: jax.Array) -> jax.Array:
            if not jnp.issubdtype(value.dtype, jnp.floating):
                return value
            return (average + moves * (value - average)).astype(average.dtype)

        return jax.tree.map(move, averages, values)

    def _factor(self, path: str, ndim: int) -> np.ndarray:
        """Returns the factor of a parameter, or [depth, 1, …]: one for each block of a stack."""
        factor = self.factors[path]
        return factor.reshape((*factor.shape, *(1,) * (ndim - factor.ndim)))


def join(trained: Params, fixed: Params) -> Params:
    """Returns all parameters; undoes `Optimizer.split`."""
    return unflatten(flatten(trained) | flatten(fixed))


def make(config: OptimConfig, shapes: Params, steps: Steps) -> Optimizer:
    """Returns the optimiser of a run of so many steps for parameters of these shapes.

    Raises:
        UserError: what is to be frozen, or to have a rate of its own, does not fit the parameters or each other.
    """
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    decays = optax.add_decayed_weights(config.weight_decay, lambda params: by_path(_decays, params))
    transform = optax.chain(*clip, *DIRECTIONS[config.optimizer](config), decays)
    return Optimizer(transform, schedule_of(config, steps), factors_of(config, shapes), config.ema)


def _decays(path: str, _: Any) -> bool:
    return kind_of(path).decays
