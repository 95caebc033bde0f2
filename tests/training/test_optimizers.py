"""Every optimiser in a run: where its state lies, that a mesh changes nothing, that it is saved, what is left alone."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_losses import GLOBAL_BATCH, TEXT, TOWERS, host_batch, host_state

from clip_jax import optim, sharding
from clip_jax.architecture import Architecture
from clip_jax.config import OPTIMIZERS, Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, Steps
from clip_jax.models.clip import Definition
from clip_jax.models.transformer import Compute
from clip_jax.training.checkpoint import Checkpoints, Keep
from clip_jax.training.program import assemble
from clip_jax.training.state import TrainState, abstract_state
from clip_jax.training.step import Metrics, make_train_step

STEPS = Steps(10, 1)
ARCHITECTURES = {tower: Architecture(embed_dim=32, image=TOWERS[tower], text=TEXT) for tower in TOWERS}
VIT = Definition(ARCHITECTURES["vit"])


def made(definition: Definition, **config) -> optim.Optimizer:
    asked = OptimConfig(warmup="1 step", learning_rate=1e-2, **config)
    return optim.make(asked, definition.shapes().params, STEPS)


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


def placed(state: TrainState, abstract: TrainState) -> TrainState:
    """Returns a state of the host on the mesh."""
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))


# --- where the state lies ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_an_optimiser_keeps_lies_as_its_parameters_do(optimizer):
    mesh = mesh_of(2, 2, 2)
    state = abstract_state(VIT, made(VIT, optimizer=optimizer, clip_norm=1.0, lock_image=0), mesh)
    params = optim.flatten(state.params)
    of_params, others = [], []
    for row in sharding.layout(state.optimizer):
        path = next((path for path in params if row.path.endswith(f"/{path}")), None)
        others += [row] if path is None else []
        of_params += [] if path is None else [(path, row)]
    assert not any(path.startswith("image/") for path, _ in of_params)
    assert all(row.spec == P() and math.prod(row.shape) <= 3 for row in others), "counters and coefficients"
    text = {path for path in params if path.startswith("text/")}
    assert {path for path, _ in of_params} == text | {"logit_scale"}
    whole = [(path, row) for path, row in of_params if row.shape == params[path].shape]
    assert len(whole) >= len(of_params) / 2
    for path, row in whole:
        assert row.spec == params[path].sharding.spec, row.path


def test_sides_of_a_matrix_are_split_as_the_dimensions_that_they_have():
    state = abstract_state(VIT, made(VIT, optimizer="adafactor"), mesh_of(2, 2, 2)).optimizer[0]
    for tree, spec in ((state.rows, P(None, "fsdp", None, None)), (state.columns, P(None, None, None, "tensor"))):
        qkv = tree["text"]["blocks"]["attention"]["qkv"]["kernel"]  # [depth D 3 N K], split over D and N
        assert qkv.sharding == NamedSharding(mesh_of(2, 2, 2), spec)


# --- a mesh changes nothing ---


@functools.cache
def updated(optimizer: str, sizes: tuple[int, int, int]) -> TrainState:
    """Returns the state after three updates with gradients of noise, on the host; some blocks are fixed."""
    made_ = made(VIT, optimizer=optimizer, clip_norm=1.0, layer_decay=0.8, lock_text=2)
    with jax.enable_x64(True):
        abstract = abstract_state(VIT, made_, mesh_of(*sizes))
        state = placed(host_state(abstract, "float64"), abstract)
        places = jax.tree.map(lambda x: x.sharding, (made_.split(abstract.params)[0], abstract.optimizer))
        update = jax.jit(made_.update, out_shardings=places)
        trained, fixed = made_.split(state.params)
        kept = state.optimizer
        for step in range(3):
            random = np.random.default_rng(step)
            gradients = jax.tree.map(lambda x, r=random: r.normal(size=x.shape), trained)
            trained, kept = update(jax.device_put(gradients, places[0]), kept, trained, jnp.int32(step + 1))
        return jax.device_get(TrainState(jnp.int32(3), optim.join(trained, fixed), {}, kept))


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "optimizer", ["adafactor", *[pytest.param(o, marks=pytest.mark.full) for o in OPTIMIZERS if o != "adafactor"]]
)
def test_an_update_on_8_devices_is_that_of_1(optimizer, sizes):
    expected, found = updated(optimizer, (1, 1, 1)), updated(optimizer, sizes)
    assert_close(found, expected, 1e-12)


def assert_close(found: Any, expected: Any, bound: float) -> None:
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=bound, atol=bound)


def without_key_biases(tree: Any) -> Any:
    """Returns the arrays with 0 for the biases of keys: all scores of a query move with them by the same, so that their
    gradient is rounding, of which Lion and Adafactor make steps of full size."""

    def without(keys: tuple, x: np.ndarray) -> np.ndarray:
        is_bias = sharding.path_of(keys).endswith("attention/qkv/bias")  # [depth 3 N K]
        return np.where(np.arange(3)[:, None, None] == 1, 0, x) if is_bias else x

    return jax.tree_util.tree_map_with_path(without, tree)


def stepped(
    definition: Definition, sizes: tuple[int, int, int], parts: int, **config
) -> tuple[TrainState, TrainState, Metrics]:
    """Returns the states before and after two steps, on the host, and the last one's metrics; all in float64."""
    optimizer = made(definition, **config)
    with jax.enable_x64(True):
        abstract = abstract_state(definition, optimizer, mesh_of(*sizes))
        before = host_state(abstract, "float64")
        step = make_train_step(definition, optimizer, abstract, parts=parts)
        state = placed(before, abstract)
        for n in range(2):
            batch = host_batch(definition.architecture, n, list(range(GLOBAL_BATCH)))
            state, metrics = step(state, sharding.to_mesh(batch, GLOBAL_BATCH, mesh_of(*sizes)))
        return before, jax.device_get(state), jax.device_get(metrics)


@pytest.mark.full
@pytest.mark.parametrize(
    ("optimizer", "sizes", "remat"),
    [
        ("muon", (8, 1, 1), "full"),
        *[
            pytest.param(optimizer, sizes, remat, marks=pytest.mark.full)
            for optimizer in OPTIMIZERS
            for sizes, remat in (((2, 4, 1), "full"), ((2, 2, 2), "attention"))
        ],
    ],
)
def test_locked_towers_are_trained_alike_on_any_mesh_in_any_parts_and_with_any_remat(optimizer, sizes, remat):
    asked = {"optimizer": optimizer, "lock_image": 0, "lock_text": 2, "clip_norm": 1.0}
    definition = Definition(ARCHITECTURES["vit"], Compute(dtype="float64"))
    before, expected, metrics = stepped(definition, (1, 1, 1), 1, **asked)
    _, found, on_mesh = stepped(definition.computed(remat=remat), sizes, 2, **asked)
    assert_close(without_key_biases((found, on_mesh)), without_key_biases((expected, metrics)), 1e-9)
    was, now = optim.flatten(before.params), optim.flatten(found.params)
    changed = {path for path in was if (was[path] != now[path]).any()}
    assert {path.split("/")[0] for path in changed} == {"text", "logit_scale"}
    for path in changed & {path for path in was if "/blocks/" in path}:
        assert [(x != y).any() for x, y in zip(was[path], now[path], strict=True)] == [False, True], path
    assert {"text/projection", "text/post_norm/scale", "text/blocks/mlp/up/kernel"} < changed
    assert not {"text/token_embedding", "text/positional_embedding"} & changed


# --- checkpoints ---


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_saved_on_8_devices_comes_back_on_1_bit_for_bit(optimizer, tmp_path):
    made_ = made(VIT, optimizer=optimizer, clip_norm=1.0, lock_text=2)
    abstract, alone = (abstract_state(VIT, made_, mesh_of(*sizes)) for sizes in ((2, 2, 2), (1, 1, 1)))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: np.asarray(100 * random.normal(size=x.shape)).astype(x.dtype), abstract)
    state.step = np.int32(7)
    with Checkpoints(tmp_path, keep=Keep(latest=1)) as checkpoints:
        checkpoints.save(placed(state, abstract), {})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(7, alone)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x, y, place in zip(*map(jax.tree.leaves, (restored, state, alone)), strict=True):
        assert (x.dtype, x.sharding) == (y.dtype, place.sharding)
        np.testing.assert_array_equal(x, y)
    kinds = {x.dtype.name for x in jax.tree.leaves(abstract.optimizer)}
    assert ("bfloat16" in kinds) == (optimizer == "adafactor")


# --- what is left alone ---


@pytest.mark.full
def test_a_locked_resnet_goes_by_its_running_statistics_and_leaves_them_bit_for_bit():
    definition = Definition(ARCHITECTURES["resnet"], Compute(dtype="float64"))
    before, after, metrics = stepped(definition, (1, 1, 1), 2, lock_image=0)
    assert jax.tree.leaves(after.statistics)
    jax.tree.map(np.testing.assert_array_equal, after.statistics, before.statistics)
    jax.tree.map(np.testing.assert_array_equal, after.params["image"], before.params["image"])
    assert (after.params["text"]["projection"] != before.params["text"]["projection"]).any()
    _, moved, otherwise = stepped(definition, (1, 1, 1), 2, frozen="image/(stem|stage).*")
    assert abs(otherwise["loss"] - metrics["loss"]) > 1e-6, "a pool that is trained: the batch's own statistics"
    counts = [x for path, x in optim.flatten(moved.statistics).items() if path.endswith("count")]
    assert all((x == 4).all() for x in counts), "two steps in two parts"


@pytest.mark.parametrize("tower", ["vit", pytest.param("resnet", marks=pytest.mark.full)])
def test_nothing_of_a_locked_tower_is_differentiated(tower):
    def count(**config) -> int:
        definition = Definition(ARCHITECTURES[tower])
        optimizer = made(definition, **config)
        abstract = abstract_state(definition, optimizer, mesh_of(1, 1, 1))
        step = make_train_step(definition, optimizer, abstract)
        batch = host_batch(definition.architecture, 0, list(range(GLOBAL_BATCH)))
        return len(re.findall(r"\b(dot_general|conv_general_dilated)\[", str(jax.make_jaxpr(step)(abstract, batch))))

    # With both locked nothing but the temperature is trained; and what is trained costs the same beside a locked tower.
    everything, text, image, none = count(), count(lock_image=0), count(lock_text=0), count(lock_image=0, lock_text=0)
    assert everything - image == text - none > 5
    assert everything - text == image - none > 5


def test_a_program_says_how_much_of_it_is_trained():
    def said(**config) -> list[str]:
        data = DataConfig(global_batch=8)
        asked = Config(ModelConfig(variant="ViT-W64/4@16px"), data, OptimConfig(warmup="1 step", **config))
        return [line for line in assemble(asked, jax.devices()[:1]).described() if line.startswith("trained")]

    assert said() == []
    assert said(frozen="image/.*") == ["trained: 3,267,329 of 3,425,857 parameters"]
    assert said(frozen="image/.*;text/.*") == ["trained: 1 of 3,425,857 parameters"]
