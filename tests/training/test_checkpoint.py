"""Checkpoints: what is saved comes back, bit for bit and in its place; what does not fit is refused by name."""

import gc
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import optim, sharding
from clip_jax.config import MeshConfig, ModelConfig, OptimConfig, Steps
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.variants import architecture
from clip_jax.training import checksums
from clip_jax.training.checkpoint import Checkpoints, Keep
from clip_jax.training.state import TrainState, abstract_state, initial_state

CONFIG = OptimConfig(warmup="1 step")


def state_on(mesh_sizes: tuple[int, int, int], devices: int, **model):
    definition = Definition(architecture(ModelConfig(variant="ViT-W64/4@16px", **model)))
    optimizer = optim.make(CONFIG, definition.shapes().params, Steps(10, 1))
    mesh = sharding.make_mesh(MeshConfig(*mesh_sizes), jax.devices()[:devices])
    abstract = abstract_state(definition, optimizer, mesh)
    return definition, optimizer, abstract


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    definition, optimizer, abstract = state_on((2, 2, 2), 8)
    state = initial_state(definition, optimizer, abstract, seed=3)
    state.step = state.step + 7
    with Checkpoints(folder, keep=Keep(latest=1)) as checkpoints:
        checkpoints.save(state, {"examples_seen": 7 * 32})
    return folder, state


def test_a_state_saved_on_8_devices_comes_back_on_1_bit_for_bit(saved):
    folder, state = saved
    _, _, abstract = state_on((1, 1, 1), 1)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest() == 7
        assert checkpoints.position(7) == {"examples_seen": 224}
        restored = checkpoints.restore(7, abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert all(
        x.sharding == place.sharding for x, place in zip(*map(jax.tree.leaves, (restored, abstract)), strict=True)
    )


def test_a_checkpoint_that_does_not_fit_is_refused_with_all_that_differs(saved):
    folder, _ = saved
    _, _, abstract = state_on((1, 1, 1), 1, image_size=24)
    del abstract.params["text"]["projection"]
    abstract.params["image"]["extra"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(UserError) as error, Checkpoints(folder) as checkpoints:
        checkpoints.restore(7, abstract)
    message = str(error.value)
    assert "missing image/extra" in message
    assert "unexpected text/projection" in message
    assert "image/positional_embedding is float32 (17, 64), not float32 (37, 64)" in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            "params/image.patch_embed.kernel",
            "params is not what this run would have saved: missing image/patch_embed/kernel",
        ),
        ("params/text.projection/0.0", "damaged"),
        ("params/_METADATA", "damaged"),
        ("params", "missing image/blocks/attention/out/bias; missing"),
        ("position", "damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_said_in_one_line(damage, words, saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder, tmp_path / "copy")
    target = tmp_path / "copy" / "7" / damage
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    _, _, abstract = state_on((1, 1, 1), 1)
    with Checkpoints(tmp_path / "copy") as checkpoints, pytest.raises(UserError, match=words) as error:
        checkpoints.restore(7, abstract), checkpoints.position(7)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "copy" / "7") in str(error.value)
    del error
    gc.collect()  # what Orbax's reader leaves behind when it fails is complained of here, not in some later test


def test_a_checkpoint_is_not_damaged_because_another_process_died(saved, monkeypatch):
    died = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    def restore(*_, **__):
        raise died

    folder, _ = saved
    _, _, abstract = state_on((1, 1, 1), 1)
    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", restore)
        for read in (lambda: checkpoints.position(7), lambda: checkpoints.restore(7, abstract)):
            with pytest.raises(jax.errors.JaxRuntimeError) as error:
                read()
            assert error.value is died


def test_parameters_are_created_in_their_places_and_are_the_same_on_any_mesh():
    definition, optimizer, abstract = state_on((2, 2, 2), 8)
    sharded = initial_state(definition, optimizer, abstract, seed=0)
    up = sharded.params["image"]["blocks"]["mlp"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (3, 32, 128)  # [depth D F]: D over fsdp, F over tensor
    moment = sharded.optimizer[0].mu["image"]["blocks"]["mlp"]["up"]["kernel"]
    assert moment.sharding == up.sharding
    definition, optimizer, abstract = state_on((1, 1, 1), 1)
    whole = initial_state(definition, optimizer, abstract, seed=0)
    # The same draws; what is computed from them may round differently in another partitioning.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-7), sharded.params, whole.params)


# --- storage that gives back other bytes than it was given ---


@pytest.mark.full
def test_any_of_200_flipped_bits_is_found(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "copy") / "7"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in checksums.OF_THE_COMMIT]
    random = np.random.default_rng(0)
    assert checksums.damage(folder) is None
    for path in [files[i] for i in random.permutation(200) % len(files)]:  # in every file, in many two
        content = path.read_bytes()
        bit = int(random.integers(8 * len(content)))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert checksums.damage(folder), f"bit {bit} of {path}"
        path.write_bytes(content)
    assert checksums.damage(folder) is None


# --- which stay ---


def of_step(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"a": jnp.ones(3)}, {}, {"m": jnp.ones(3)})


def kept(folder: Path, keep: Keep, metrics: dict[int, dict[str, float]]) -> list[int]:
    """Saves steps that were measured so, and returns those that are there at the end."""
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step, found in metrics.items():
            checkpoints.save(of_step(step), {}, found)
    return sorted(int(path.name) for path in folder.iterdir())


def test_where_a_metric_was_highest_stays_when_the_run_goes_on(tmp_path):
    keep = Keep(latest=1, best="x/acc1")
    assert kept(tmp_path, keep, {1: {"x/acc1": 0.1}, 2: {"x/acc1": 0.9}, 3: {"x/acc1": 0.5}}) == [2, 3]
    assert kept(tmp_path, keep, {4: {"x/acc1": 0.4}, 5: {}}) == [2, 5]
    assert kept(tmp_path, keep, {6: {"x/acc1": 0.95}, 7: {}}) == [6, 7]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_whole() == (7, {}), "what is written of metrics is in the checksums"


def test_where_a_metric_could_not_be_measured_the_run_goes_on_and_another_may_be_asked_for(tmp_path):
    keep = Keep(latest=1, best="x/acc1")
    assert kept(tmp_path, keep, {1: {"x/acc1": 0.1, "y/acc1": 0.7}, 2: {"y/acc1": 0.2}}) == [1, 2]
    assert kept(tmp_path, Keep(latest=1, best="y/acc1"), {3: {"y/acc1": 0.3}, 4: {"x/acc1": 0.3}}) == [1, 4]


def test_of_many_arrays_that_do_not_fit_twenty_are_named_and_what_to_do_is_said(tmp_path):
    kept(tmp_path, Keep(latest=1), {1: {}})
    abstract = of_step(1)
    abstract.optimizer = {f"moment{i}": jnp.ones(3) for i in range(30)}
    with pytest.raises(UserError) as error, Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(1, abstract)
    assert str(error.value).startswith(f"{tmp_path}/1/optimizer is not what this run would have saved: missing moment")
    assert str(error.value).count("missing") == 20
    assert "; and 11 more; if another version of clip_jax has written it" in str(error.value)
    assert str(error.value).endswith("or begin anew with init_from set to this run's folder")
