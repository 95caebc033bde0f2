"""Gradients against autograd through OpenAI's own code, and what only a ResNet has: batch norm in training, on one
device and on eight, and stages of one bottleneck.
"""

import concurrent.futures
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import openai_clip, require

from clip_jax import losses, optim, sharding
from clip_jax.architecture import Architecture, ResNetTower, TextTower, ViTTower
from clip_jax.config import MeshConfig, OptimConfig, Steps
from clip_jax.models.clip import Definition, Weights, l2_normalise, normalise_pixels
from clip_jax.models.resnet import BatchNorm, Stage
from clip_jax.models.transformer import REMAT, Compute
from clip_jax.training.state import TrainState, abstract_state
from clip_jax.training.step import make_train_step
from clip_jax.typing import Batch
from clip_jax.weights import openai
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import export_tensors, flatten, unflatten

TEXT = TextTower(context_length=12, vocab_size=50, width=128, depth=2, num_heads=2, mlp_dim=512)
VIT = Architecture(16, ViTTower(image_size=32, patch_size=8, width=128, depth=2, num_heads=2, mlp_dim=512), TEXT)
RESNET = Architecture(16, ResNetTower(image_size=64, width=8, depths=(1, 3, 1, 1), num_heads=4), TEXT)
WIDE = Definition(RESNET, Compute(dtype="float64"))
BARS = {"float64": (1e-9, 1e-9), "float32": (1e-5, 1e-4)}  # of values, of gradients; relative to the tensor's largest
PAIRS = 8


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """What runs once or twice need not be fast: compiling it takes half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def torch():
    """PyTorch on one thread: a second one would, at full load, wait for the first after each of many small products."""
    torch = require("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


def random_weights(architecture: Architecture, dtype: str = "float64") -> Weights:
    """Returns weights of which none is 0 or 1: a term that is left out shows."""
    random = np.random.default_rng(0)

    def drawn(path: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        if like.dtype == np.int32:
            return random.integers(2, 9, like.shape, np.int32)
        middle = 1 if path.endswith(("scale", "variance")) else 0
        return np.asarray(random.normal(middle, 0.1, like.shape), dtype)

    shapes = Definition(architecture).shapes()
    return unflatten({path: drawn(path, like) for path, like in flatten(shapes).items()}, shapes)


def random_batch(architecture: Architecture, seed: int = 1) -> Batch:
    random = np.random.default_rng(seed)
    size, text = architecture.image.image_size, architecture.text
    tokens = np.zeros((PAIRS, text.context_length), np.int32)
    for row, length in zip(tokens, random.integers(2, text.context_length + 1, PAIRS), strict=True):
        row[:length] = [*random.integers(1, text.vocab_size - 1, length - 1), text.vocab_size - 1]
    return Batch(random.integers(0, 256, (PAIRS, size, size, 3), np.uint8), tokens, np.ones(PAIRS, bool))


def inputs(architecture: Architecture, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels and tokens."""
    batch = random_batch(architecture, seed)
    return normalise_pixels(batch.image, architecture.preprocess), batch.tokens


@functools.partial(jax.jit, static_argnums=0)
def differentiate(definition: Definition, weights: Weights, image_BHWC, tokens_BL):
    """Returns the loss in training, its gradients, and what the statistics are then."""

    def loss_of(params):
        model = definition.bind(Weights(params, weights.statistics))
        img_BE = l2_normalise(model.encode_image(image_BHWC, train=True))
        txt_BE = l2_normalise(model.encode_text(tokens_BL))
        loss = losses.softmax(img_BE, txt_BE, scale=model.scale(), valid_B=jnp.ones(len(img_BE), bool)).loss
        return loss, model.statistics()

    (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights.params)
    return loss, gradients, statistics


def assert_close(found: dict, expected: dict, bar: float) -> None:
    """Checks arrays by name, each in relation to its largest element."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        error = np.abs(np.float64(found[name]) - x).max()
        assert error <= bar * np.abs(x).max(), f"{name}: {error}"


# --- PyTorch ---


@pytest.fixture
def original(torch, monkeypatch):
    """OpenAI's code, as a function that returns its model with given weights, in their dtype and in training."""
    clip = openai_clip()
    # Its layer norm computes in float32, whatever comes in.
    monkeypatch.setattr(clip.model.LayerNorm, "forward", torch.nn.LayerNorm.forward)

    def build(architecture: Architecture, weights: Weights):
        state = openai.state_dict(Bundle(architecture, flatten(weights), "", ""))
        tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
        model = clip.model.build_model(dict(tensors)).to(tensors["logit_scale"].dtype)  # now rounded to float16
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        return model.train()

    return build


def their_statistics(model) -> dict[str, np.ndarray]:
    return {name: x.numpy().copy() for name, x in model.named_buffers()}


def by_their_names(tree) -> dict[str, np.ndarray]:
    """Returns parameters, gradients or statistics by OpenAI's names; queries, keys and values apart."""
    return dict(thirds(export_tensors(openai.RULES, flatten(Weights(tree, {})))))


def thirds(tensors: dict[str, np.ndarray]):
    """Yields (name, array), those of queries, keys and values apart and named as in the attention pool."""
    for name, x in tensors.items():
        if "in_proj_" in name:
            yield from zip((name.replace("in_proj_", f"{word}_proj.") for word in "qkv"), np.split(x, 3), strict=True)
        else:
            yield name, x


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_loss_gradients_and_statistics_are_those_of_autograd(architecture, dtype, torch, original):
    weights = random_weights(architecture, dtype)
    image_BHWC, tokens_BL = inputs(architecture)
    with jax.enable_x64(dtype == "float64"):
        loss, gradients, statistics = differentiate(
            Definition(architecture, Compute(dtype=dtype)), weights, image_BHWC, tokens_BL
        )

    model = original(architecture, weights)
    image_BCHW = torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy()).to(model.dtype)
    logits = model(image_BCHW, torch.from_numpy(tokens_BL))  # of images, of texts
    their_loss = sum(torch.nn.functional.cross_entropy(x, torch.arange(PAIRS)) for x in logits) / 2
    their_loss.backward()

    value_bar, gradient_bar = BARS[dtype]
    assert {x.dtype for x in (loss, *jax.tree.leaves(gradients))} == {np.dtype(dtype)}
    np.testing.assert_allclose(loss, their_loss.item(), rtol=value_bar)
    assert_close(by_their_names(statistics), their_statistics(model), value_bar)
    found = by_their_names(gradients)
    expected = dict(thirds({name: x.grad.numpy() for name, x in model.named_parameters()}))
    for key_bias in [name for name in expected if name.endswith("k_proj.bias")]:
        # What all keys have in common softmax does not see: the true gradient is 0, and what is found is rounding. It
        # is one more row of the kernel's gradient, for an input of 1, and may be as far off as the others are.
        largest = np.abs(expected[key_bias.replace("bias", "weight")]).max()
        for x in (found.pop(key_bias), expected.pop(key_bias)):
            assert np.abs(x).max() <= gradient_bar * largest, key_bias
    assert_close(found, expected, gradient_bar)


def test_running_statistics_after_1_and_after_3_batches_are_those_of_pytorch(x64, torch, original):
    weights = random_weights(RESNET)
    model = original(RESNET, weights)
    before = their_statistics(model)
    for batch in (1, 2, 3):
        image_BHWC, tokens_BL = inputs(RESNET, seed=batch)
        *_, statistics = differentiate(WIDE, weights, image_BHWC, tokens_BL)
        weights = Weights(weights.params, statistics)
        model.encode_image(torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy()))
        if batch != 2:
            assert_close(by_their_names(statistics), their_statistics(model), 1e-9)
    assert {int(x - before[name]) for name, x in their_statistics(model).items() if name.endswith("tracked")} == {3}


# --- batch norm ---


def test_batch_norm_is_the_formula_in_training_and_in_inference(x64):
    random = np.random.default_rng(0)
    x, scale, bias, mean = random.normal(1, 2, (3, 4, 5, 7)), *random.normal(size=(3, 7))
    variance = random.uniform(0.5, 2, 7)
    norm = BatchNorm(7)
    norm.scale, norm.bias = nnx.Param(jnp.asarray(scale)), nnx.Param(jnp.asarray(bias))
    norm.mean, norm.variance = nnx.BatchStat(jnp.asarray(mean)), nnx.BatchStat(jnp.asarray(variance))

    def assert_statistics(*expected):
        for found, x in zip((norm.mean, norm.variance, norm.count), expected, strict=True):
            np.testing.assert_allclose(found[...], x, rtol=1e-12)

    found = norm(jnp.asarray(x), train=False)
    np.testing.assert_allclose(found, (x - mean) / np.sqrt(variance + 1e-5) * scale + bias, rtol=0, atol=1e-12)
    assert_statistics(mean, variance, 0)

    found = norm(jnp.asarray(x), train=True)
    centred, channels = x - x.mean((0, 1, 2)), x.reshape(-1, 7)
    expected = centred / np.sqrt((centred**2).mean((0, 1, 2)) + 1e-5) * scale + bias
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert_statistics(
        0.9 * mean + 0.1 * channels.mean(0), 0.9 * variance + 0.1 * (centred**2).sum((0, 1, 2)) / (3 * 4 * 5 - 1), 1
    )


def test_in_training_nothing_depends_on_the_running_statistics(x64):
    params, statistics = random_weights(RESNET)
    others = jax.tree.map(lambda x: 3 * x + 1, statistics)
    one, other = (differentiate(WIDE, Weights(params, x), *inputs(RESNET)) for x in (statistics, others))
    for x, y in zip(*map(jax.tree.leaves, (one[:2], other[:2])), strict=True):
        np.testing.assert_array_equal(x, y)


@functools.cache
def one_step(sizes: tuple[int, int, int]) -> tuple[TrainState, TrainState, float]:
    """Returns the states before and after a training step on a mesh, on the host, and the loss."""
    config = OptimConfig(warmup="0 steps", learning_rate=1e-2, weight_decay=0.5)
    optimizer = optim.make(config, WIDE.shapes().params, Steps(2, 0))
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    with jax.enable_x64(True):
        abstract = abstract_state(WIDE, optimizer, mesh)
        params, statistics = jax.tree.map(jnp.array, random_weights(RESNET))
        before = TrainState(jnp.int32(0), params, statistics, optimizer.init(params))
        state = jax.device_put(before, jax.tree.map(lambda x: x.sharding, abstract))
        before = jax.device_get(before)
        step = make_train_step(WIDE, optimizer, abstract)
        after, metrics = step(state, sharding.to_mesh(random_batch(RESNET), PAIRS, mesh))
        return before, jax.device_get(after), metrics["loss"].item()


@pytest.mark.full
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 2, 2),
        pytest.param((8, 1, 1), marks=pytest.mark.full),
        pytest.param((1, 8, 1), marks=pytest.mark.full),
    ],
)
def test_a_step_on_8_devices_gives_the_loss_parameters_and_statistics_of_1(sizes):
    with concurrent.futures.ThreadPoolExecutor() as pool:  # one compiles while the other does
        (before, expected, expected_loss), (_, found, loss) = pool.map(one_step, [(1, 1, 1), sizes])
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-9)
    assert_close(flatten(found.weights), flatten(expected.weights), 1e-9)
    for path, x in flatten(before.weights).items():
        assert not np.array_equal(x, flatten(found.weights)[path]), path


@pytest.mark.full
def test_neither_gradients_nor_weight_decay_reach_the_statistics(x64):
    before, after, _ = one_step((1, 1, 1))
    *_, statistics = differentiate(WIDE, before.weights, *inputs(RESNET))
    # The step normalises pixels on the device, where float32 rounds otherwise. A decay would take 0.5 %, AdamW 0.01.
    assert_close(flatten(Weights({}, after.statistics)), flatten(Weights({}, statistics)), 1e-6)
    moments = optax.tree.get(after.optimizer, "mu")
    assert jax.tree.structure(moments) == jax.tree.structure(after.params)


# --- the stages ---


def test_remat_policies_give_equal_gradients_and_statistics_of_a_stage_and_full_keeps_less(x64):
    random = np.random.default_rng(0)
    x_BHWD = jnp.asarray(random.normal(size=(PAIRS, 8, 8, 16)))
    graph, *kinds = nnx.split(Stage(16, 8, 3, pool=2, key=jax.random.key(0)), nnx.Param, nnx.BatchStat)
    moved = jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape), [nnx.to_pure_dict(x) for x in kinds])
    results, memory = {}, {}
    for remat in REMAT:

        def loss_of(params, statistics, x_BHWD, remat=remat):
            stage = nnx.merge(graph, params, statistics)
            loss = (stage(x_BHWD, train=True, remat=remat) ** 2).sum()
            return loss, nnx.to_pure_dict(nnx.state(stage, nnx.BatchStat))

        gradient = jax.grad(loss_of, argnums=(0, 2), has_aux=True)
        compiled = jax.jit(gradient).lower(*moved, x_BHWD).compile()
        results[remat] = compiled(*moved, x_BHWD)
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert memory["full"] <= memory["dots"] < memory["none"]
    for remat in REMAT:
        for found, expected in zip(*map(jax.tree.leaves, (results[remat], results["none"])), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_the_attention_pool_makes_the_embedding_of_the_last_of_the_states(x64):
    @jax.jit
    def run(weights, image_BHWC):
        tower = WIDE.bind(weights).image
        assert [stage.rest is None for stage in (tower.stage1, tower.stage2, tower.stage3, tower.stage4)] == [
            depth == 1 for depth in RESNET.image.depths
        ]
        states = tower.states(image_BHWC)
        return states, tower.attention_pool(states[-1]), tower(image_BHWC)

    states, pooled, expected = run(random_weights(RESNET), inputs(RESNET)[0])
    assert [x.shape for x in states] == [
        (PAIRS, 16, 16, 32),
        *[(PAIRS, 8, 8, 64)] * 3,
        (PAIRS, 4, 4, 128),
        (PAIRS, 2, 2, 256),
    ]
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
