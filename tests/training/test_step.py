"""One update: what it leaves, it leaves in its place; what repeats adds up."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import optim, sharding
from clip_jax.architecture import ResNetTower
from clip_jax.config import MeshConfig, OptimConfig, Steps
from clip_jax.models.clip import LOGIT_SCALE_MAX, Definition, Weights, normalise_pixels
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import VARIANTS
from clip_jax.training import step as training_step
from clip_jax.training.state import TrainState, abstract_state, initial_state, initialiser
from clip_jax.training.step import make_train_step, norms
from clip_jax.typing import Batch

ARCHITECTURE = VARIANTS["ViT-W64/4@16px"]
RESNET = ResNetTower(image_size=32, depths=(1, 1, 1, 1), width=8, num_heads=4)
CONFIG = OptimConfig(warmup="1 step", learning_rate=1e-2)


def batch_of(size: int) -> Batch:
    random = np.random.default_rng(0)
    tokens = np.zeros((size, 16), np.int32)
    tokens[:, :4] = [[49406, word, word + 1, 49407] for word in random.integers(1, 900, size)]
    return Batch(random.integers(0, 256, (size, 16, 16, 3), np.uint8), tokens, np.ones(size, bool))


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.full)])
def test_a_step_leaves_the_state_in_its_places_and_is_compiled_once(sizes):
    definition = Definition(ARCHITECTURE)
    optimizer = optim.make(CONFIG, definition.shapes().params, Steps(10, 1))
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    abstract = abstract_state(definition, optimizer, mesh)
    state = initial_state(definition, optimizer, abstract, seed=0)
    step = make_train_step(definition, optimizer, abstract)
    batch = sharding.to_mesh(batch_of(16), 16, mesh)
    for _ in range(3):
        state, metrics = step(state, batch)
    moved = [
        sharding.path_of(keys)
        for (keys, x), place in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(abstract), strict=True)
        if x.sharding != place.sharding
    ]
    assert moved == []
    assert step._cache_size() == 1
    assert state.step.item() == 3
    assert np.isfinite(metrics["loss"].item())


def test_no_parameter_that_is_split_is_ever_whole_on_a_device():
    """Not even while it is drawn: a large model has no room for that."""
    definition = Definition(ARCHITECTURE)
    optimizer = optim.make(CONFIG, definition.shapes().params, Steps(10, 1))
    abstract = abstract_state(definition, optimizer, sharding.make_mesh(MeshConfig(1, 8, 1)))
    text = initialiser(definition, optimizer, abstract).lower(jax.random.key(0)).compile().as_text()
    made = {int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"\bf32\[([\d,]+)\]", text)}
    split = [x for x in jax.tree.leaves(abstract.params) if not x.sharding.is_fully_replicated]
    whole, eighths = ({x.size // n for x in split} for n in (1, 8))
    assert len(whole - eighths) >= 4
    assert eighths <= made
    assert not made & (whole - eighths)
    assert max(made) == max(eighths)


def test_norms_are_of_all_and_by_tower_and_none_of_a_tower_that_has_nothing_trained():
    tree = {"image": {"a": jnp.full(4, 3.0), "b": jnp.float32(0)}, "text": {"a": jnp.full(1, 8.0)}, "logit_scale": 1.0}
    found = {name: value.item() for name, value in norms("gradient", tree).items()}
    assert found == {"gradient_norm_image": 6, "gradient_norm_text": 8, "gradient_norm": pytest.approx(101**0.5)}
    for nothing in ({}, None, {"a": None}):
        assert norms("gradient", tree | {"image": nothing}).keys() == {"gradient_norm", "gradient_norm_text"}


def test_logit_scale_never_passes_ln_100():
    definition = Definition(ARCHITECTURE)
    optimizer = optim.make(CONFIG, definition.shapes().params, Steps(10, 1))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(definition, optimizer, mesh)
    state = initial_state(definition, optimizer, abstract, seed=0)
    state.params["logit_scale"] = jnp.float32(LOGIT_SCALE_MAX + 1)
    step = make_train_step(definition, optimizer, abstract)
    state, _ = step(state, sharding.to_mesh(batch_of(8), 8, mesh))
    assert state.params["logit_scale"].item() <= np.float32(LOGIT_SCALE_MAX)


def test_an_update_that_is_not_finite_leaves_everything_but_the_step_and_the_next_goes_on(monkeypatch):
    """Planted is one record whose pixels become NaN; batch norm's statistics would keep it."""
    arch = dataclasses.replace(ARCHITECTURE, image=RESNET)
    definition = Definition(arch)
    optimizer = optim.make(CONFIG, definition.shapes().params, Steps(10, 1))
    abstract = abstract_state(definition, optimizer, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    state = initial_state(definition, optimizer, abstract, seed=0)

    def planted(pixels: jax.Array, *how) -> jax.Array:
        marked_B = (pixels == 255).all((1, 2, 3))
        return jnp.where(marked_B[:, None, None, None], jnp.nan, normalise_pixels(pixels, *how))

    monkeypatch.setattr(training_step, "normalise_pixels", planted)
    step = make_train_step(definition, optimizer, abstract)
    batch = batch_of(8)
    batch = batch._replace(image=np.tile(batch.image, (1, 2, 2, 1)))
    bad = batch._replace(image=batch.image.copy())
    bad.image[3] = 255
    for given, finite in ((batch, True), (bad, False), (batch, True)):
        before = jax.device_get(state)
        state, metrics = step(state, given)
        after = jax.device_get(state)
        assert metrics["finite"].item() is finite
        assert after.step == before.step + 1
        changed = jax.tree.map(lambda x, y: bool((x != y).any()), *(replace_step(x) for x in (before, after)))
        assert any(jax.tree.leaves(changed)) is finite
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def replace_step(state: TrainState) -> TrainState:
    return dataclasses.replace(state, step=None)


@pytest.mark.full
def test_gradients_of_a_token_that_repeats_add_up_in_float32_under_bfloat16_compute():
    definition = Definition(ARCHITECTURE, Compute(dtype="bfloat16"))
    params, statistics = jax.jit(definition.init)(jax.random.key(0))
    tokens = jnp.asarray(np.tile(batch_of(1).tokens, (512, 1)))  # one caption, 512 times

    def total(params, tokens):
        return definition.bind(Weights(params, statistics)).encode_text(tokens).astype(jnp.float32).sum()

    once = jax.grad(total)(params, tokens[:1])["text"]["token_embedding"]
    often = jax.grad(total)(params, tokens)["text"]["token_embedding"]
    # A batch of 512 is another program than one of 1: each rounds to bfloat16 (2^-8) some eight times on the way.
    # Adding 512 equal numbers up in bfloat16 would be off by half.
    np.testing.assert_allclose(often, 512 * once, rtol=0, atol=2**-5 * float(jnp.abs(512 * once).max()))
