"""The towers part by part: the gradients of the whole batch, in a fraction of its memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.test_resnet_run import SMALL as RESNET

from clip_jax import losses, sharding
from clip_jax.architecture import Architecture
from clip_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition, Weights
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import VARIANTS
from clip_jax.models.vit import some_patches
from clip_jax.training.microbatch import check_microbatch, in_parts
from clip_jax.training.program import assemble
from clip_jax.training.step import make_encode
from clip_jax.typing import Batch

VIT = VARIANTS["ViT-W64/4@16px"]
SIZE = 64


def batch_of(size: int, architecture: Architecture) -> Batch:
    random = np.random.default_rng(0)
    tokens = np.zeros((size, 16), np.int32)
    tokens[:, :4] = [[49406, word, word + 1, 49407] for word in random.integers(1, 900, size)]
    side = architecture.image.image_size
    return Batch(random.integers(0, 256, (size, side, side, 3), np.uint8), tokens, random.random(size) < 0.9)


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])


@functools.cache
def compiled(mesh: jax.sharding.Mesh, parts: int, dtype: str) -> tuple[jax.stages.Compiled, tuple]:
    """Returns the program of the loss's value and gradients, with half of the patches dropped; and its arguments."""
    definition = Definition(VIT, Compute(dtype=dtype, patch_dropout=0.5))
    params = jax.tree.map(lambda x: x.astype(dtype), jax.jit(definition.init)(jax.random.key(0)).params)
    ring = losses.ring_for(LossConfig(form="ring"), mesh, sharding.BATCH_AXES, SIZE)

    def loss(params, batch):
        encode = in_parts(make_encode(definition, jax.random.key(5)), parts, mesh)
        (img, txt), _ = encode(Weights(params, {}), batch, jnp.arange(SIZE))
        return losses.softmax(img, txt, scale=jnp.exp(params["logit_scale"]), valid_B=batch.valid, ring=ring).loss

    specs = sharding.parameter_specs(params)
    places = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    arguments = jax.device_put(params, places), sharding.to_mesh(batch_of(SIZE, VIT), SIZE, mesh)
    return jax.jit(jax.value_and_grad(loss), out_shardings=(None, places)).lower(*arguments).compile(), arguments


def value_and_gradients(mesh: jax.sharding.Mesh, parts: int, dtype: str) -> list[np.ndarray]:
    program, arguments = compiled(mesh, parts, dtype)
    return jax.tree.leaves(jax.device_get(program(*arguments)))


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray], bound: float) -> None:
    assert len(found) == len(expected) > 20
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=bound * np.abs(y).max())


@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 1), *[pytest.param(s, marks=pytest.mark.full) for s in ((1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2))]],
)
def test_gradients_of_8_parts_are_those_of_the_whole_batch_in_float64(x64, sizes):
    whole = value_and_gradients(mesh_of(1, 1, 1), 1, "float64")
    assert_equal(value_and_gradients(mesh_of(*sizes), 8, "float64"), whole, 1e-12)


@pytest.mark.full
def test_gradients_of_8_parts_are_those_of_the_whole_batch_in_float32():
    mesh = mesh_of(1, 1, 1)
    assert_equal(value_and_gradients(mesh, 8, "float32"), value_and_gradients(mesh, 1, "float32"), 5e-6)


# --- what is compiled ---


def collectives(text: str) -> list[str]:
    """Returns the lines of a compiled program in which devices talk to each other."""
    talk = r"^\s*(?:ROOT )?%\S+ = .*? (?:all-(?:reduce|gather|to-all)|reduce-scatter|collective-|ragged-)[\w-]*\("
    return [line for line in text.splitlines() if re.match(talk, line)]


def crossing_images(text: str) -> list[str]:
    """Returns the lines in which pixels, or patches of them, go to another device."""
    return [line for line in collectives(text) if re.search(r"u8\[|16,16,3\]|16,48\]", line)]


def reduced_in_loops(text: str) -> list[str]:
    """Returns the lines in which all devices add something up, once for each part or block."""
    loops = [part for part in text.split("\n\n") if "ENTRY" not in part]
    return [line for part in loops for line in collectives(part) if "reduce" in line]


@pytest.mark.parametrize("sizes", [(8, 1, 1), pytest.param((2, 4, 1), marks=pytest.mark.full)])
def test_no_image_crosses_a_device(sizes):
    text = compiled(mesh_of(*sizes), 4, "float32")[0].as_text()
    assert crossing_images(text) == []
    assert [line for line in collectives(text) if "reduce" in line and "64,256]" in line], "gradients do: the MLP's"


def test_replicated_parameters_have_their_gradients_reduced_once_and_not_in_every_part():
    text = compiled(mesh_of(8, 1, 1), 4, "float32")[0].as_text()
    assert reduced_in_loops(text) == []


@pytest.mark.full
def test_what_is_looked_for_in_a_compiled_program_is_found_where_the_batch_is_cut_without_care():
    """Neighbours in one part, and the mesh left to the compiler."""
    mesh, definition = mesh_of(8, 1, 1), Definition(VIT)
    arguments = jax.jit(definition.init)(jax.random.key(0)), sharding.to_mesh(batch_of(SIZE, VIT), SIZE, mesh)

    def loss(weights, batch):
        @jax.checkpoint
        def one(part):
            return make_encode(definition)(weights, *part, jax.sharding.NamedSharding(mesh, sharding.BATCH))[0]

        rows = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), (batch, jnp.arange(SIZE)))
        img, txt = jax.tree.map(lambda x: x.reshape(SIZE, -1), jax.lax.map(one, rows))
        return losses.softmax(img, txt, scale=jnp.float32(14), valid_B=batch.valid).loss

    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text()
    assert crossing_images(text)
    assert reduced_in_loops(text)


@pytest.mark.full
def test_an_eighth_of_the_batch_at_a_time_takes_a_fifth_of_the_memory_or_less():
    def memory(microbatch: int | None) -> int:
        config = Config(
            model=ModelConfig(variant="ViT-W64/4@16px", patch_dropout=0.5),
            data=DataConfig(global_batch=2048),
            loss=LossConfig(form="ring"),
            microbatch=microbatch,
        )
        program = assemble(config, jax.devices()[:1])
        return program.train_step.lower(program.state, program.batch).compile().memory_analysis().temp_size_in_bytes

    assert memory(None) >= 5 * memory(256)


# --- what goes through the parts ---


@pytest.mark.full
def test_batch_norm_sees_every_part_and_no_gradient_goes_through_its_running_statistics():
    definition = Definition(RESNET)
    weights = jax.jit(definition.init)(jax.random.key(0))
    encode = in_parts(make_encode(definition), 4, mesh_of(1, 1, 1))
    batch = jax.tree.map(jnp.asarray, batch_of(16, RESNET))
    _, statistics = jax.jit(encode)(weights, batch, jnp.arange(16))
    assert statistics["image"]["stem1"]["norm"]["count"] == 4

    def through_statistics(params):
        return sum(
            jnp.sum(x) for x in jax.tree.leaves(encode(Weights(params, weights.statistics), batch, jnp.arange(16))[1])
        )

    gradients = jax.jit(jax.grad(through_statistics, allow_int=True))(weights.params)
    assert not any(np.any(x) for x in jax.tree.leaves(gradients))


@pytest.mark.full
def test_dropped_patches_are_another_choice_for_each_image_and_step_and_none_in_evaluation():
    definition = Definition(VIT, Compute(patch_dropout=0.5))
    weights = jax.jit(definition.init)(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, batch_of(1, VIT))
    batch = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), batch)  # the same image four times

    def embeddings(step: int):
        encode = in_parts(make_encode(definition, jax.random.fold_in(jax.random.key(0), step)), 1, mesh_of(1, 1, 1))
        return np.asarray(jax.jit(encode)(weights, batch, jnp.arange(4))[0][0])

    first = embeddings(1)
    assert len(np.unique(first.round(5), axis=0)) == 4
    assert np.abs(first - embeddings(2)).max() > 1e-3
    np.testing.assert_array_equal(first, embeddings(1))
    without = in_parts(make_encode(Definition(VIT)), 1, mesh_of(1, 1, 1))(weights, batch, jnp.arange(4))[0][0]
    model = definition.bind(weights)
    pixels = (np.float32(batch.image) / 255 - np.float32(VIT.preprocess.mean)) / np.float32(VIT.preprocess.std)
    evaluated = model.encode_image(jnp.asarray(pixels))
    np.testing.assert_allclose(evaluated / jnp.linalg.norm(evaluated, axis=1, keepdims=True), without, atol=1e-5)


def test_as_many_patches_are_kept_as_are_asked_for_and_the_class_token_always():
    x_BLD = jnp.broadcast_to(jnp.arange(17.0)[:, None], (64, 17, 2))  # each state is its position
    seen_BL = np.asarray(some_patches(x_BLD, jax.random.split(jax.random.key(0), 64), 4, first=1)[..., 0])
    assert seen_BL.shape == (64, 1 + 4)
    assert (seen_BL[:, 0] == 0).all()
    assert all(len(set(row)) == 5 for row in seen_BL), "no patch twice"
    assert np.bincount(np.int32(seen_BL[:, 1:]).ravel(), minlength=17)[1:].min() > 0, "every patch at some time"


# --- bad input ---


@pytest.mark.parametrize(
    ("microbatch", "nearest"), [(7, "4, 8, 12"), (5, "4, 8"), (100, "24, 48"), (3, "4"), (20, "12, 16, 24")]
)
def test_a_microbatch_that_does_not_divide_is_refused_with_the_nearest_that_do(microbatch, nearest):
    with pytest.raises(UserError, match=rf"microbatch={microbatch} must divide .*=48 .* 4 devices; .*: .*{nearest}"):
        check_microbatch(microbatch, 48, mesh_of(2, 2, 2))
    assert check_microbatch(None, 48, mesh_of(2, 2, 2)) == 1
    assert check_microbatch(12, 48, mesh_of(2, 2, 2)) == 4


def test_patches_of_a_model_without_patches_are_not_dropped():
    with pytest.raises(UserError, match=r"model.patch_dropout=0.5: RN50 has no patches"):
        assemble(Config(model=ModelConfig(variant="RN50", patch_dropout=0.5)), jax.devices()[:1])
