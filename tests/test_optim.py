"""The schedule at its corners, what decays, and AdamW against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax import optim
from clip_jax.config import OptimConfig, Steps
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.sharding import path_of


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_the_learning_rate_is_zero_then_linear_then_a_cosine_to_zero(warmup):
    schedule = optim.schedule(
        OptimConfig(
            learning_rate=2e-3,
        ),
        Steps(110, warmup),
    )
    steps = np.arange(111)
    cosine = 1e-3 * (1 + np.cos(np.pi * (steps - warmup) / (110 - warmup)))
    expected = np.where(steps < warmup, 2e-3 * steps / max(warmup, 1), cosine)
    np.testing.assert_allclose([schedule(step) for step in steps], expected, rtol=1e-5, atol=1e-9)
    assert schedule(200) == schedule(110) == 0


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50", "ViT-B-16-SigLIP", "ViT-L-14-CLIPA"])  # all kinds of paths
def test_kernels_embeddings_and_projections_decay_and_gains_and_biases_do_not(name):
    mask = optim.decay_mask(Definition(VARIANTS[name]).shapes().params)
    for keys, decays in jax.tree_util.tree_leaves_with_path(mask):
        path = path_of(keys)
        kept = path.endswith(("bias", "/scale", "class_embedding")) or path == "logit_scale"
        assert decays is not kept, path
    assert mask["text"]["blocks"]["mlp_norm"]["scale"] is False, "though it is a matrix, [depth D]"
    assert mask["text"]["blocks"]["mlp"]["up"]["kernel"] is True


def test_a_parameter_of_unknown_kind_is_an_error():
    with pytest.raises(KeyError, match="gain"):
        optim.decay_mask({"image": {"gain": jnp.ones(3)}})


PARAMS = {
    "block": {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]]), "bias": np.array([0.1, -0.2])},
    "norm": {"scale": np.ones((2, 3))},
    "logit_scale": np.array(2.6),
}


def gradients(step: int) -> dict:
    random = np.random.default_rng(step)
    return jax.tree.map(lambda x: random.normal(size=x.shape), PARAMS)


def adamw(config: OptimConfig, rates: list[float]) -> dict:
    """Returns PARAMS after a step at each of the learning rates: arXiv 1711.05101, algorithm 2, in float64."""
    params = PARAMS
    first = second = jax.tree.map(np.zeros_like, PARAMS)
    for step, rate in enumerate(rates, start=1):
        grads = gradients(step)
        if config.clip_norm is not None:
            norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
            grads = jax.tree.map(lambda g, norm=norm: g * min(1, config.clip_norm / norm), grads)
        first = jax.tree.map(lambda m, g: config.b1 * m + (1 - config.b1) * g, first, grads)
        second = jax.tree.map(lambda v, g: config.b2 * v + (1 - config.b2) * g**2, second, grads)
        moves = jax.tree.map(
            lambda m, v, t=step: m / (1 - config.b1**t) / (np.sqrt(v / (1 - config.b2**t)) + config.eps), first, second
        )
        moves["block"]["kernel"] = moves["block"]["kernel"] + config.weight_decay * params["block"]["kernel"]
        params = jax.tree.map(lambda p, move, rate=rate: p - rate * move, params, moves)
    return params


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_three_steps_are_adamws(clip_norm):
    config = OptimConfig(learning_rate=0.1, warmup="2 steps", weight_decay=0.3, b1=0.8, b2=0.9, clip_norm=clip_norm)
    optimizer = optim.optimizer(config, Steps(4, 2))
    params = jax.tree.map(jnp.float32, PARAMS)
    state = optimizer.init(params)
    for step in (1, 2, 3):
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradients(step)), state, params)
        params = optax.apply_updates(params, updates)
    # A parameter of at most 3 is rounded 3 times; 1 - 0.9 in the bias correction makes ten eps of one, in moves of 0.1.
    tolerance = 3 * (3 + 10 * 0.1) * np.finfo(np.float32).eps
    expected = adamw(config, [0.0, 0.05, 0.1])
    jax.tree.map(
        lambda found, truth: np.testing.assert_allclose(found, truth, rtol=0, atol=tolerance), params, expected
    )
