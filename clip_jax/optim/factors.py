"""What the learning rate of each parameter is multiplied by: locked towers, frozen patterns, layer-wise decay, factors.

All of them multiply, and 0 means: it stays as it is.
"""

import re
from collections.abc import Iterable

import numpy as np

from clip_jax.config import OptimConfig
from clip_jax.errors import UserError, nearest_few
from clip_jax.optim.parameters import Params, flatten, is_adapter, layers_of

Factors = dict[str, np.ndarray]  # by path: one number, or [depth] for a stack, one for each block


def factors_of(config: OptimConfig, shapes: Params) -> Factors:
    """Returns the factors of parameters of these shapes.

    Raises:
        UserError: a pattern that matches nothing, or nothing that is trained; a tower that cannot be locked so; nothing
            is left to train.
    """
    factors = dict.fromkeys(flatten(shapes), np.ones(()))
    for tower, locked in (("image", config.lock_image), ("text", config.lock_text)):
        for path, factor in _of_tower(tower, shapes[tower], config.layer_decay, locked).items():
            factors[f"{tower}/{path}"] = factor
    for pattern in config.frozen_patterns():
        factors |= {path: np.zeros_like(factors[path]) for path in _matched("frozen", pattern, factors)}
    if any(map(is_adapter, factors)):
        factors |= {path: np.zeros_like(factor) for path, factor in factors.items() if not is_adapter(path)}
    for pattern, factor in config.factors_by_pattern().items():
        paths = _matched("factors", pattern, factors)
        if not any(factors[path].any() for path in paths):
            raise UserError(f"optim.factors: {pattern!r} matches only what is not trained; leave this factor out")
        factors |= {path: np.asarray(factors[path] * factor) for path in paths}
    if not any(factor.any() for factor in factors.values()):
        fields = {f"optim.{name}": getattr(config, name) for name in ("lock_image", "lock_text", "frozen")}
        given = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value is not None)
        raise UserError(f"nothing is left to train: by {given} all there is stays as it is; give some of it free")
    return factors


def _of_tower(tower: str, shapes: Params, decay: float | None, locked: int | None) -> Factors:
    """Returns the factors of a tower that is locked but for its last groups, and whose layers decay."""
    layers = layers_of(shapes)
    top = max(layer.max() for layer in layers.values())
    if locked and "stem1" in shapes:
        raise UserError(
            f"optim.lock_{tower}={locked}: a ResNet is locked whole, by 0, as in OpenCLIP; for a part of it there is "
            f"optim.frozen, such as 'image/st(em|age)[123]/.*'"
        )
    if locked is not None and locked > top + 1:
        raise UserError(
            f"optim.lock_{tower}={locked}: the {tower} tower has {top + 1} groups; to train them all let it be None"
        )
    trained = 0 if locked is None else top + 1 - locked  # the first layer that is
    decay = 1.0 if decay is None else decay
    return {path: np.asarray(decay ** (top - layer) * (layer >= trained)) for path, layer in layers.items()}


def _matched(field: str, pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that a pattern matches as a whole."""
    matched = [path for path in paths if re.fullmatch(pattern, path)]
    if not matched:
        raise UserError(f"optim.{field}: {pattern!r} matches no whole path of a parameter{nearest_few(pattern, paths)}")
    return matched
