"""Adapters (LoRA) in stacked blocks: they begin as nothing, learn as PyTorch's do block by block, and merge exactly."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import openai_clip, require

from clip_jax import optim, sharding
from clip_jax.architecture import Architecture, Lora, Preprocess, ResNetTower, TextTower, ViTTower
from clip_jax.config import MeshConfig, ModelConfig, OptimConfig, Steps
from clip_jax.errors import UserError
from clip_jax.models import variants
from clip_jax.models.clip import Definition, Weights
from clip_jax.models.transformer import Compute
from clip_jax.optim.parameters import is_adapter
from clip_jax.optim.schedules import schedule_of
from clip_jax.training.state import TrainState, abstract_state
from clip_jax.training.step import make_train_step
from clip_jax.typing import Batch
from clip_jax.weights import adapters, openai
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import flatten, unflatten

TEXT = TextTower(context_length=12, vocab_size=50, width=128, depth=2, num_heads=2, mlp_dim=512)
IMAGE = ViTTower(image_size=32, patch_size=8, width=128, depth=3, num_heads=2, mlp_dim=512)
VIT = Architecture(16, IMAGE, TEXT, Preprocess((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
LORA = Lora(rank=4, alpha=8.0)
PAIRS, STEPS = 8, 5


def random_weights(definition: Definition, dtype: str, *, drawn: tuple[str, ...] = ()) -> Weights:
    """Returns weights of which none is 0 or 1, but for adapters that are not `drawn`: those begin as they do."""
    random = np.random.default_rng(0)
    begun = flatten(definition.init(jax.random.key(1)))

    def draw(path: str, like: jax.Array) -> np.ndarray:
        x = random.normal(1 if path.endswith("scale") else 0, 0.1, like.shape)
        return np.asarray(begun[path] if is_adapter(path) and not path.endswith(drawn) else x, dtype)

    return unflatten({path: draw(path, like) for path, like in begun.items()}, definition.shapes())


def batches() -> list[Batch]:
    """Returns batches whose pixels are 0 or 255: they are divided by 255 without rounding."""
    random = np.random.default_rng(1)
    tokens = random.integers(1, 49, (STEPS, PAIRS, TEXT.context_length), np.int32)
    for row, length in zip(tokens.reshape(-1, TEXT.context_length), 2 + np.arange(STEPS * PAIRS) % 10, strict=True):
        row[length] = TEXT.vocab_size - 1
    images = 255 * random.integers(0, 2, (STEPS, PAIRS, 32, 32, 3), np.uint8)
    return [Batch(*pair, np.ones(PAIRS, bool)) for pair in zip(images, tokens, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def logits(definition: Definition, weights: Weights, image_BHWC, tokens_BL) -> jax.Array:
    return definition.bind(weights)(image_BHWC, tokens_BL)[0]


def inputs(pairs: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Returns pixels and tokens."""
    random = np.random.default_rng(2)
    image_BHWC = random.normal(size=(pairs, 32, 32, 3)).astype(dtype)
    return jnp.asarray(image_BHWC), jnp.asarray(random.integers(0, 50, (pairs, 12), np.int32))


@pytest.mark.full
def test_adapters_begin_as_nothing_beside_the_weights_that_are_drawn_without_them():
    plain, with_them = Definition(VIT), Definition(VIT, Compute(lora=LORA))
    base, all_of_them = (flatten(definition.init(jax.random.key(0))) for definition in (plain, with_them))
    for path, x in base.items():
        np.testing.assert_array_equal(all_of_them[path], x)
    added = {path: x for path, x in all_of_them.items() if path not in base}
    assert {path.rpartition("/")[2] for path in added} == {"lora_a", "lora_b"}
    assert len(added) == 2 * 2 * 4
    for path, x in added.items():
        kernel = base[path.rpartition("/")[0] + "/kernel"]
        if path.endswith("lora_b"):
            assert not x.any(), path
        else:
            fan_in = 512 if "down" in path else 128
            assert len(np.unique(x)) > 0.99 * x.size, "each block has its own"
            assert 0.95 < np.abs(x).max() * fan_in**0.5 <= 1, path
        assert len(x) == len(kernel)


@pytest.mark.full
@pytest.mark.parametrize("pairs", [1, 64], ids=["one product for q, k and v", "three"])
def test_adapters_that_have_learnt_nothing_leave_the_first_forward_pass_bit_for_bit(pairs):
    base = random_weights(Definition(VIT), "float32")
    with_them = random_weights(Definition(VIT, Compute(lora=LORA)), "float32")
    image_BHWC, tokens_BL = inputs(pairs, "float32")
    arrays = flatten(with_them) | flatten(base)
    with_them = unflatten(arrays, with_them)
    expected = logits(Definition(VIT), base, image_BHWC, tokens_BL)
    found = logits(Definition(VIT, Compute(lora=LORA)), with_them, image_BHWC, tokens_BL)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.full
@pytest.mark.parametrize("pairs", [1, 64], ids=["one product for q, k and v", "three"])
def test_merged_kernels_compute_what_adapters_do_beside_them(pairs, x64):
    definition = Definition(VIT, Compute("float64", lora=LORA))
    weights = random_weights(definition, "float64", drawn=("lora_a", "lora_b"))
    plain = Definition(VIT, Compute("float64"))
    merged = unflatten(adapters.merged(flatten(weights), LORA), plain.shapes())
    image_BHWC, tokens_BL = inputs(pairs, "float64")
    expected = logits(definition, weights, image_BHWC, tokens_BL)
    found = logits(plain, merged, image_BHWC, tokens_BL)
    without = logits(plain, unflatten(flatten(weights), plain.shapes()), image_BHWC, tokens_BL)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    assert np.abs(without - expected).max() > 1e-2 * np.abs(expected).max(), "they do something"


# --- PyTorch, block by block ---


class TheirRun:
    """OpenAI's model in PyTorch, of which every block's matrices are W + scale · B A, and only A and B are trained."""

    def __init__(self, weights: Weights, torch, clip):
        arrays = flatten(weights)
        plain = {path: x for path, x in arrays.items() if not is_adapter(path)}
        state = openai.state_dict(Bundle(dataclasses.replace(VIT, preprocess=Preprocess()), plain, "", ""))
        tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
        self.model = clip.model.build_model(dict(tensors)).to(tensors["logit_scale"].dtype)
        self.model.load_state_dict({name: tensors[name] for name in self.model.state_dict()})
        self.model.requires_grad_(requires_grad=False)
        self.torch, self.learnt = torch, {}
        for tower, blocks in (("image", self.model.visual.transformer), ("text", self.model.transformer)):
            for i, block in enumerate(blocks.resblocks):
                at = functools.partial(self._adapt, arrays, f"{tower}/blocks", i)
                at("attention/qkv", block.attn, "in_proj_weight", 3)
                at("attention/out", block.attn.out_proj, "weight", 1)
                at("mlp/up", block.mlp.c_fc, "weight", 1)
                at("mlp/down", block.mlp.c_proj, "weight", 1)

    def _adapt(self, arrays, at: str, i: int, path: str, module, name: str, thirds: int) -> None:
        """Puts the adapters of one matrix of one block into its place; [out, in] as PyTorch has it."""
        torch = self.torch
        a, b = (arrays[f"{at}/{path}/{name}"][i] for name in ("lora_a", "lora_b"))
        a = a.reshape(-1, thirds, LORA.rank).transpose(1, 2, 0)  # [T, R, in]
        b = b.reshape(thirds, LORA.rank, -1).transpose(0, 2, 1)  # [T, out, R]
        down = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in a]
        up = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in b]
        self.learnt[f"{at}/{path}", i] = down, up

        class Adapted(torch.nn.Module):
            def forward(self, w):
                return w + LORA.scale * torch.cat([y @ x for x, y in zip(down, up, strict=True)])

        torch.nn.utils.parametrize.register_parametrization(module, name, Adapted())

    def train(self, config: OptimConfig, schedule: Callable) -> list[float]:
        """Returns the losses of the steps."""
        torch = self.torch
        parameters = [x for pair in self.learnt.values() for part in pair for x in part]
        adamw = torch.optim.AdamW(
            parameters, betas=(config.b1, config.b2), eps=config.eps, weight_decay=config.weight_decay
        )
        losses = []
        for step, batch in enumerate(batches()):
            adamw.param_groups[0]["lr"] = float(schedule(step))
            image = torch.from_numpy(batch.image.transpose(0, 3, 1, 2) / 255).to(self.model.dtype)
            logits = self.model(image, torch.from_numpy(batch.tokens))
            loss = sum(torch.nn.functional.cross_entropy(x, torch.arange(PAIRS)) for x in logits) / 2
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            losses.append(loss.item())
        return losses

    def arrays(self) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
        """Returns A [T, in, R] and B [T, R, out] of every matrix of every block."""
        return {
            at: tuple(np.stack([x.detach().numpy().T for x in part]) for part in pair)
            for at, pair in self.learnt.items()
        }


def our_run(weights: Weights, dtype: str, config: OptimConfig) -> tuple[list[float], TrainState]:
    """Returns the losses of the steps, and the state after them."""
    definition, steps = Definition(VIT, Compute(dtype, lora=LORA)), Steps(STEPS, 1)
    optimizer = optim.make(config, definition.shapes().params, steps)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    abstract = abstract_state(definition, optimizer, mesh)
    params = jax.tree.map(jnp.array, weights.params)
    state = TrainState(jnp.int32(0), params, weights.statistics, optimizer.init(optimizer.split(params)[0]))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))
    step = make_train_step(definition, optimizer, abstract)
    losses = []
    for batch in batches():
        state, metrics = step(state, sharding.to_mesh(batch, PAIRS, mesh))
        losses.append(metrics["loss"].item())
    return losses, jax.device_get(state)


@pytest.mark.full
# Adam divides by the gradient's own size: where that is rounding, float32's result is, too, unless eps is larger.
@pytest.mark.parametrize(
    ("dtype", "eps", "bar"), [("float64", 1e-6, 1e-9), pytest.param("float32", 1e-2, 1e-5, marks=pytest.mark.full)]
)
def test_5_steps_in_stacked_blocks_are_those_of_pytorch_block_by_block(dtype, eps, bar, monkeypatch):
    clip, torch = openai_clip(), require("torch")
    monkeypatch.setattr(clip.model.LayerNorm, "forward", torch.nn.LayerNorm.forward)  # else float32, whatever comes in
    config = OptimConfig(learning_rate=1e-2, weight_decay=0.2, warmup="1 step", eps=eps)
    with jax.enable_x64(dtype == "float64"):
        weights = random_weights(Definition(VIT, Compute(lora=LORA)), dtype)
        losses, state = our_run(weights, dtype, config)
        theirs = TheirRun(weights, torch, clip)
        expected = theirs.train(config, schedule_of(config, Steps(STEPS, 1)))
    error = np.abs(np.array(losses) / expected - 1).max()
    found, worst = flatten(state.weights), 0.0
    for (module, i), (a, b) in theirs.arrays().items():
        assert np.abs(b).max() > 1e-3, "it has learnt"
        for name, x in (("lora_a", a), ("lora_b", b)):
            ours = found[f"{module}/{name}"][i]
            ours = ours.reshape(x.shape if name == "lora_b" else (-1, len(x), LORA.rank))
            ours = ours if name == "lora_b" else ours.swapaxes(0, 1)
            worst = max(worst, float(np.abs(ours - x).max() / np.abs(x).max()))
    print(f"{dtype}: losses {error:.1e}, adapters {worst:.1e}")
    assert error <= bar
    assert worst <= bar
    for path, x in flatten(weights).items():
        if not is_adapter(path):
            assert found[path].tobytes() == x.tobytes(), path


# --- what cannot be ---


def test_adapters_in_a_resnet_or_of_no_low_rank_are_refused():
    resnet = dataclasses.replace(VIT, image=ResNetTower(64, width=8, depths=(1, 1, 1, 1), num_heads=4))
    with pytest.raises(UserError, match=r"model\.lora_rank=4: .*a ResNet has none"):
        variants.check(ModelConfig(None, lora_rank=4), resnet)
    with pytest.raises(UserError, match=r"rank 128 .* the image tower is 128 wide, the text tower is 128 wide"):
        variants.check(ModelConfig(None, lora_rank=128), VIT)
    variants.check(ModelConfig(None, lora_rank=127), VIT)
