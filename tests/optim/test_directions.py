"""Each optimiser on stacked blocks is what it is on the blocks one by one: against NumPy, PyTorch, and Optax itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer_oracles as oracles
import pytest
from oracles import require

from clip_jax import optim
from clip_jax.config import OPTIMIZERS, OptimConfig, Steps
from clip_jax.optim.directions import scale_by_adafactor

PLAIN = OptimConfig(learning_rate=0.05, warmup="2 steps", weight_decay=0.3, b1=0.8, b2=0.9)
STEPS = Steps(8, 2)
# The text tower's groups are: embeddings, block 0, block 1, block 2 with its norm, projection.
PARTLY = dataclasses.replace(
    PLAIN,
    clip_norm=3.0,
    layer_decay=0.7,
    lock_text=3,
    frozen="image/patch_embed/.*;image/blocks/mlp_norm/scale",
    factors="image/.*=0.5;.*/mlp/.*=2;logit_scale=3",
)


def factor_of_all(path: str, block: int | None) -> float:
    return 1.0


def factor_in_part(path: str, block: int | None) -> float:
    """Returns what `PARTLY` means for one tensor; both towers have three blocks."""
    tower, _, name = path.partition("/")
    if path in ("image/patch_embed/kernel", "image/blocks/mlp_norm/scale"):
        return 0.0
    if tower == "logit_scale":
        return 3.0
    layer = block + 1 if block is not None else {"post_norm": 3, "projection": 4}.get(name.split("/")[0], 0)
    if tower == "text" and layer < 2:
        return 0.0
    return 0.7 ** (4 - layer) * (0.5 if tower == "image" else 1.0) * (2.0 if "/mlp/" in path else 1.0)


CASES = {"all": (PLAIN, factor_of_all), "in part": (PARTLY, factor_in_part)}


def ours(config: OptimConfig, dtype: str) -> dict[str, np.ndarray]:
    """Returns parameters, by path, after some steps with the gradients of the oracles."""
    optimizer = optim.make(config, oracles.SHAPES, STEPS)
    params, *gradients = (
        optim.unflatten({path: x.astype(dtype) for path, x in oracles.random_params(seed).items()})
        for seed in range(oracles.STEPS + 1)
    )
    trained, fixed = optimizer.split(params)
    state, update = jax.jit(optimizer.init)(trained), jax.jit(optimizer.update)
    for step, gradient in enumerate(gradients):
        trained, state = update(optimizer.split(gradient)[0], state, trained, step)
    after = optim.flatten(optim.join(trained, fixed))
    assert after.keys() == oracles.random_params(0).keys()
    assert {x.dtype for x in after.values()} == {np.dtype(dtype)}
    return {path: np.asarray(x) for path, x in after.items()}


def rates(config: OptimConfig) -> list[float]:
    schedule = optim.make(config, oracles.SHAPES, STEPS).schedule
    return [float(schedule(step)) for step in range(oracles.STEPS)]


def compare(found: dict, expected: dict, config: OptimConfig, *, bound: float, few: float) -> None:
    """Asserts that parameters are no further apart than the bound.

    Of Adafactor's a `few` may be, as a share: a momentum in the middle between two of bfloat16's numbers may become
    either. That is as rare as float32's roundings within bfloat16's, a few of 2^-24 in 2^-9; in float64, too, where a
    processor has an instruction for it, which takes float32. Of 4, the largest, the two are 2^-5 apart: that goes into
    moves of 0.05.
    """
    errors = np.concatenate([np.abs(found[path] - x).ravel() for path, x in expected.items()])
    if config.optimizer != "adafactor":
        assert errors.max() <= bound
        return
    assert np.mean(errors > bound) < few
    assert errors.max() < 2.0**-5 * config.b1 * sum(rates(config)) * 2


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_on_stacked_blocks_are_those_on_each_block_in_float64(x64, optimizer, case):
    config, factor = CASES[case]
    config = dataclasses.replace(config, optimizer=optimizer)
    params = oracles.random_params(0)
    expected = oracles.trained(config, rates(config), factor, params=params)
    found = ours(config, "float64")
    # Newton and Schulz' iteration takes small singular values times 3.4 in each of five rounds: 500 eps.
    compare(found, expected, config, bound=1e-11 if optimizer == "muon" else 1e-13, few=1e-4)
    for path in params:
        moved = [block for block, _ in oracles.cut(path, params[path]) if factor(path, block)]
        assert (found[path] != params[path]).any() == bool(moved), path


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_five_steps_on_stacked_blocks_are_those_on_each_block_in_float32(optimizer):
    config, factor = CASES["in part"]
    config = dataclasses.replace(config, optimizer=optimizer)
    expected = oracles.trained(config, rates(config), factor, params=oracles.random_params(0))
    found = ours(config, "float32")
    compare(found, expected, config, bound=1e-5, few=1e-3)


def test_fixed_blocks_and_parameters_stay_bit_for_bit_whatever_comes():
    optimizer = optim.make(dataclasses.replace(PARTLY, clip_norm=None), oracles.SHAPES, STEPS)
    zeros = optim.unflatten(
        {path: np.full(x.shape, -0.0, np.float32) for path, x in optim.flatten(oracles.SHAPES).items()}
    )
    trained, fixed = optimizer.split(zeros)
    nans = jax.tree.map(lambda x: x + np.float32(np.nan), trained)
    after, _ = jax.jit(optimizer.update)(nans, jax.jit(optimizer.init)(trained), trained, 3)
    for path, x in optim.flatten(optim.join(after, fixed)).items():
        for block, tensor in oracles.cut(path, np.asarray(x)):
            if factor_in_part(path, block):
                assert np.isnan(tensor).all(), path
            else:
                np.testing.assert_array_equal(tensor.view(np.int32), np.float32(-0.0).view(np.int32), err_msg=path)


def test_what_is_fixed_has_neither_gradients_nor_moments():
    optimizer = optim.make(PARTLY, oracles.SHAPES, STEPS)
    trained, fixed = optimizer.split(oracles.SHAPES)
    assert {*optim.flatten(fixed)} == {
        *("image/patch_embed/kernel", "image/blocks/mlp_norm/scale"),
        *("text/token_embedding", "text/positional_embedding"),
    }
    mu = optax.tree.get(jax.eval_shape(optimizer.init, trained), "mu")
    assert optim.flatten(mu).keys() == optim.flatten(trained).keys()
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), trained)
    numbers = optimizer.trained_numbers(oracles.SHAPES)
    assert sum(x.sum() for x in jax.tree.leaves(optimizer.of_trained(ones))) == numbers
    assert numbers == sum(
        tensor.size
        for path, x in oracles.random_params(0).items()
        for block, tensor in oracles.cut(path, x)
        if factor_in_part(path, block)
    )


# --- others' code ---


@pytest.mark.parametrize("case", CASES)
def test_adamw_is_pytorchs_with_a_group_for_every_tensor(x64, case):
    torch = require("torch")
    config, factor = CASES[case]
    params, groups = {}, []
    for path, x in oracles.random_params(0).items():
        params[path] = []
        for block, tensor in oracles.cut(path, x):
            p = torch.nn.Parameter(torch.tensor(tensor), requires_grad=factor(path, block) != 0)
            params[path].append(p)
            if p.requires_grad:
                decay = config.weight_decay if p.ndim == 2 else 0.0
                groups.append({"params": [p], "weight_decay": decay, "factor": factor(path, block)})
    peer = torch.optim.AdamW(groups, betas=(config.b1, config.b2), eps=config.eps)
    for step, rate in enumerate(rates(config)):
        for path, x in oracles.random_params(step + 1).items():
            for p, (_, gradient) in zip(params[path], oracles.cut(path, x), strict=True):
                p.grad = torch.tensor(gradient) if p.requires_grad else None
        if config.clip_norm is not None:  # without the 1e-6 that PyTorch's own adds to the norm
            gradients = [p.grad for group in groups for p in group["params"]]
            norm = torch.nn.utils.get_total_norm(gradients)
            torch._foreach_mul_(gradients, min(1.0, float(config.clip_norm / norm)))
        for group in peer.param_groups:
            group["lr"] = rate * group["factor"]
        peer.step()
    found = ours(config, "float64")
    for path, tensors in params.items():
        expected = oracles.put_together(path, [p.detach().numpy() for p in tensors], found[path].shape)
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-14, err_msg=path)


def steps_of(transform: optax.GradientTransformation, gradients: list[jax.Array]) -> np.ndarray:
    state, update = transform.init(gradients[0]), jax.jit(transform.update)
    directions = []
    for gradient in gradients:
        direction, state = update(gradient, state, gradient)
        directions.append(jax.tree.leaves(direction)[0])
    return np.array(directions)


@pytest.mark.parametrize("shape", [(32, 48), (64, 33), (31, 64), (40,)])
def test_adafactor_on_one_matrix_is_optaxs_with_big_visions_settings(x64, shape):
    gradients = [jnp.asarray(np.random.default_rng(t).normal(size=shape)) for t in range(5)]
    peer = optax.scale_by_factored_rms(
        decay_rate=0.8,
        min_dim_size_to_factor=32,
        epsilon=1e-30,
        decay_rate_fn=lambda t, power: jnp.minimum(0.6, 1 - (t + 1.0) ** -power),
    )
    path = "text/projection" if len(shape) == 2 else "text/projection_bias"
    ours = scale_by_adafactor(0.0, 0.6)
    found = steps_of(ours, [optim.unflatten({path: gradient}) for gradient in gradients])
    np.testing.assert_allclose(found, steps_of(peer, gradients), rtol=1e-13)


@pytest.mark.parametrize("shape", [(32, 48), (64, 33)])
def test_muon_on_one_matrix_is_optaxs(x64, shape):
    gradients = [jnp.asarray(np.random.default_rng(t).normal(size=shape)) for t in range(5)]
    expected = steps_of(optax.contrib.scale_by_muon(beta=0.8), gradients) * 0.2 * max(shape) ** 0.5
    config = dataclasses.replace(PLAIN, optimizer="muon", weight_decay=0.0)
    trees = [optim.unflatten({"text/blocks/mlp/up/kernel": x[None]}) for x in gradients]
    found = steps_of(optim.make(config, oracles.SHAPES, STEPS).transform, trees)
    np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=1e-13)
    # The size that AdamW's directions have in practice, whatever the shape: singular values end in 0.7 to 1.2.
    assert 0.1 < np.sqrt((found[-1] ** 2).mean()) < 0.25


def test_adafactor_keeps_of_a_matrix_its_sides_and_half_a_momentum():
    config = dataclasses.replace(PLAIN, optimizer="adafactor")
    optimizer = optim.make(config, oracles.SHAPES, STEPS)
    state = jax.eval_shape(optimizer.init, oracles.SHAPES)[0]
    [rows, columns, momentum] = (optim.flatten(tree) for tree in (state.rows, state.columns, state.momentum))
    qkv = "text/blocks/attention/qkv/kernel"  # [depth D 3 N K]
    assert (rows[qkv].shape, columns[qkv].shape) == ((3, 40, 3, 1, 1), (3, 1, 3, 4, 10))
    assert rows["text/blocks/attention/out/kernel"].shape == (3, 4, 10, 1)
    assert rows["image/projection"].shape == (32, 16), "too small"
    assert {x.dtype for x in momentum.values()} == {jnp.dtype(jnp.bfloat16)}
