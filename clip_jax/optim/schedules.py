"""The learning rate by step: a warm-up, one of four curves, a cool-down."""

import jax
import jax.numpy as jnp
import optax

from clip_jax.config import OptimConfig, Steps


def _cosine(step: jax.Array, steps: Steps) -> jax.Array:
    return (1 + jnp.cos(jnp.pi * _progress(step, steps))) / 2


def _linear(step: jax.Array, steps: Steps) -> jax.Array:
    return 1 - _progress(step, steps)


def _rsqrt(step: jax.Array, steps: Steps) -> jax.Array:
    """Returns √(warm-up / step): big_vision's 1/√(1 + (step - warm-up) / timescale), whose timescale is the warm-up."""
    return jax.lax.rsqrt(jnp.maximum(step, steps.warmup) / steps.warmup)


def _constant(step: jax.Array, steps: Steps) -> jax.Array:
    return jnp.ones_like(step)


CURVES = {"cosine": _cosine, "linear": _linear, "rsqrt": _rsqrt, "constant": _constant}  # 1 where the warm-up ends


def schedule_of(config: OptimConfig, steps: Steps) -> optax.Schedule:
    """Returns the learning rate by step: in a line over the warm-up, as in OpenCLIP with 1/warm-up of it for the first
    update, not 0; then the curve, over the cool-down times a line to 0. The first update of a run is its step 0, the
    last `total - 1`; from `total` on the rate is 0."""

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, float)  # float32, exact to 16 million; with JAX's 64 bits float64
        warm = jnp.minimum((step + 1) / max(steps.warmup, 1), 1)
        cool = jnp.clip((steps.total - step) / max(steps.cooldown, 1), 0, 1)
        return config.learning_rate * warm * cool * CURVES[config.schedule](step, steps)

    return schedule


def _progress(step: jax.Array, steps: Steps) -> jax.Array:
    """Returns which share of the run behind the warm-up is over."""
    return jnp.clip((step - steps.warmup) / (steps.total - steps.warmup), 0, 1)
