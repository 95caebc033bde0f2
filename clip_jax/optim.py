"""The optimiser: AdamW with decoupled weight decay, not on gains and biases; warm-up and cosine (CLIP, section 2.5)."""

import jax
import optax

from clip_jax.config import OptimConfig, Steps

# The last word of a parameter's path says what it is. By name and never by `ndim`: in stacked blocks the scale of a
# layer norm is a matrix.
DECAYED = {
    "kernel": True,
    "lora_a": True,
    "lora_b": True,
    "projection": True,
    "projection_bias": False,
    "token_embedding": True,
    "positional_embedding": True,
    "class_embedding": False,
    "probe": True,
    "scale": False,
    "bias": False,
    "logit_scale": False,
    "logit_bias": False,
}


def schedule(config: OptimConfig, steps: Steps) -> optax.Schedule:
    """Returns the learning rate by step: linear from 0 over the warm-up, then a cosine that ends at 0."""
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps.warmup, steps.total)


def decay_mask(params: dict) -> dict:
    """Returns True where weight decay applies, in the shape of the parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: DECAYED[path[-1].key], params)


def optimizer(config: OptimConfig, steps: Steps) -> optax.GradientTransformation:
    """Returns AdamW as the config describes it."""
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
