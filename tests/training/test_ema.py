"""Moving averages of the weights: against NumPy block by block, kept, and what a run is measured and loaded by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clip_jax
from clip_jax import optim, sharding
from clip_jax.architecture import Architecture, ResNetTower, TextTower
from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, Steps
from clip_jax.errors import UserError
from clip_jax.models import variants
from clip_jax.models.clip import Definition
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.loop import train
from clip_jax.training.state import abstract_state, initial_state
from clip_jax.training.step import make_train_step
from clip_jax.typing import Batch
from clip_jax.weights.mapping import flatten

RESNET = Architecture(
    embed_dim=16,
    image=ResNetTower(32, width=8, depths=(1, 3, 1, 1), num_heads=4),
    text=TextTower(16, 49408, width=32, depth=3, num_heads=2, mlp_dim=64),
)
CONFIG = OptimConfig(learning_rate=1e-2, warmup="0 steps", ema=0.2, lock_text=2)


def batch(step: int) -> Batch:
    random = np.random.default_rng(step)
    tokens = np.zeros((8, 16), np.int32)
    tokens[:, :3] = [[49406, word, 49407] for word in random.integers(1, 900, 8)]
    return Batch(random.integers(0, 256, (8, 32, 32, 3), np.uint8), tokens, np.ones(8, bool))


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.full)])
def test_averages_after_five_steps_are_numpys_block_by_block(sizes, x64):
    """Two of three blocks of the text tower are fixed, and so is what comes before them."""
    definition = Definition(RESNET)
    optimizer = optim.make(CONFIG, definition.shapes().params, Steps(10, 0))
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    abstract = abstract_state(definition, optimizer, mesh)
    state = initial_state(definition, optimizer, abstract, seed=0)
    step = make_train_step(definition, optimizer, abstract)
    states = [jax.device_get(state)]
    for n in range(5):
        state, _ = step(state, sharding.to_mesh(batch(n), 8, mesh))
        states.append(jax.device_get(state))
    found = flatten(states[-1].ema)
    trained = optim.flatten(optimizer.split(states[0].params)[0])
    assert set(found) == set(trained) | set(optim.flatten(states[0].statistics))
    assert "text/token_embedding" not in found
    steps = [flatten(s.weights) for s in states]
    for path, average in found.items():
        if path.endswith("count"):
            np.testing.assert_array_equal(average, 5)
            continue
        parts = range(len(average)) if average.ndim > 1 else [...]  # a stack's blocks, or the rows of something else
        for part in parts:
            expected = np.float64(steps[0][path][part])
            for t in range(5):
                stays = min(0.2, (1 + t) / (10 + t))
                expected = stays * expected + (1 - stays) * np.float64(steps[t + 1][path][part])
            np.testing.assert_allclose(average[part], expected, rtol=1e-6, atol=1e-7, err_msg=path)
    averaged = flatten(state.averaged)
    for path, last in steps[-1].items():
        np.testing.assert_array_equal(averaged[path], found.get(path, last), err_msg=path)


@pytest.mark.full
def test_an_update_that_is_skipped_leaves_the_averages():
    definition = Definition(RESNET)
    optimizer = optim.make(CONFIG, definition.shapes().params, Steps(10, 0))
    abstract = abstract_state(definition, optimizer, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    state = initial_state(definition, optimizer, abstract, seed=0)
    state.params["logit_scale"] = jnp.float32(jnp.nan)
    before = jax.device_get(state.ema)
    state, metrics = make_train_step(definition, optimizer, abstract)(state, batch(0))
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.ema), before)


@pytest.mark.parametrize("resnet", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_resumed_run_goes_on_averaging_and_is_loaded_by_its_averages(resnet, data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(variants.VARIANTS, "RN-small", RESNET)
    config = Config(
        model=ModelConfig(variant="RN-small" if resnet else "ViT-W64/4@16px"),
        data=DataConfig(data_dir=str(data_dir), global_batch=16),
        optim=OptimConfig(warmup="1 step", learning_rate=1e-2, ema=0.9, lock_text=0),
        duration="4 steps",
        checkpoint_every=2,
    )
    devices = jax.devices()[:1]
    for name in ("whole", "resumed"):
        train(config, tmp_path / name, devices=devices)
    for path in (tmp_path / "resumed" / "checkpoints").glob("4*"):
        path.rename(tmp_path / path.name)  # as if it had been killed before
    train(config, tmp_path / "resumed", devices=devices)
    models = [clip_jax.load(tmp_path / name)[0] for name in ("whole", "resumed")]
    whole, resumed = ({path: np.asarray(x) for path, x in flatten(model.weights).items()} for model in models)
    for path, x in whole.items():
        np.testing.assert_array_equal(resumed[path], x, err_msg=path)
    with Checkpoints(tmp_path / "whole" / "checkpoints") as checkpoints:
        places = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(devices[0])),
            models[0].definition.shapes(),
        )
        last = optim.flatten(checkpoints._restore(4, params=places.params)["params"])
    differ = {path for path, x in last.items() if (np.asarray(x) != whole[path]).any()}
    assert {path for path in differ if path.startswith("text/")} == set(), "it is locked"
    assert any(path.startswith("image/") for path in differ), "the averages are not the last weights"


def test_averages_of_adapters_are_refused():
    with pytest.raises(UserError, match=r"optim.ema=0.9 .* model.lora_rank=4 adapters alone are trained"):
        Config(model=ModelConfig(lora_rank=4), optim=OptimConfig(ema=0.9), init_from="ViT-B/32")
    with pytest.raises(UserError, match=r"optim.ema=1.0 must be in \(0, 1\), or None"):
        OptimConfig(ema=1.0)
