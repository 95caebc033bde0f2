"""Attention of sequences in pieces against softmax(QKᵀ)V in NumPy, float64: results, gradients, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from clip_jax.architecture import ViTTower
from clip_jax.models import transformer
from clip_jax.models.attention import CUDNN, attend, attend_by_cudnn
from clip_jax.models.clip import Definition, Weights
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import VARIANTS

B, N, L, K = 3, 2, 7, 5
CAUSAL = np.tri(L, dtype=bool)
AT_B = np.array([0, 3, 6])  # one position of each row
CUTS = {"whole": (), "class token first": (1,), "class token last": (L - 1,), "three": (2, 5)}


def heads(seed: int, length: int = L) -> list[np.ndarray]:
    """Returns queries, keys, values and a cotangent of the result."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(B, N, n, K)) for n in (length, L, L, length)]


def oracle(q, k, v, d, seen=None):
    """Returns the result and the gradients of queries, keys and values."""
    scores = q @ k.swapaxes(-1, -2)
    scores = scores if seen is None else np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    d_weights = d @ v.swapaxes(-1, -2)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    return weights @ v, d_scores @ k, d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ d


def found(q, k, v, d, seen=None, cuts=()):
    """Returns the same of `attend`, given the sequence in pieces, put together again."""
    split = [tuple(jnp.asarray(x) for x in np.split(x, cuts, axis=2)) for x in (q, k, v, d)]
    result, back = jax.vjp(lambda q, k, v: attend(q, k, v, seen), *split[:3])
    return [np.concatenate(x, axis=2) for x in (result, *back(split[3]))]


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_pieces_gather_and_have_the_gradients_of_the_whole(x64, cuts):
    inputs = heads(0)
    for x, expected in zip(found(*inputs, cuts=cuts), oracle(*inputs), strict=True):
        assert x.dtype == np.float64
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("seen", "queries"), [(CAUSAL, L), (CAUSAL[AT_B][:, None, None], 1)], ids=["causal", "one position of each row"]
)
def test_what_is_not_seen_has_no_weight_and_no_gradient(x64, seen, queries):
    inputs = heads(1, queries)
    for x, expected in zip(found(*inputs, seen=jnp.asarray(seen)), oracle(*inputs, seen), strict=True):
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-13)


def test_float32_is_within_1e_6_and_scores_of_a_thousand_do_not_overflow():
    for size, tolerance in ((1, 1e-6), (30, 2e-4)):  # a score of s has an error of 2⁻²⁴ s, and so has its exponential
        inputs = [np.float32(x) for x in heads(2)]
        inputs[0], inputs[1] = inputs[0] * size, inputs[1] * size
        for x, expected in zip(found(*inputs), oracle(*map(np.float64, inputs)), strict=True):
            assert x.dtype == np.float32
            np.testing.assert_allclose(x, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def test_bfloat16_rounds_weights_and_results_but_no_scores():
    inputs = [np.asarray(jnp.bfloat16(x)) for x in heads(3)]
    expected = oracle(*map(np.float64, inputs))
    for i, x in enumerate(found(*inputs, cuts=(L - 1,))):
        assert x.dtype == jnp.bfloat16
        # 2⁻⁹ from the weights and 2⁻⁹ from the result, of terms that add up to more than the result.
        np.testing.assert_allclose(np.float64(x), expected[i], rtol=0, atol=4 * 2**-9 * np.abs(expected[i]).max())


def test_scores_that_bfloat16_would_round_alike_are_told_apart():
    query, keys = np.full((1, 1, 1, 2), 8.0), np.array([[8.0, 8.0], [8.0, 8.0625]]).reshape(1, 1, 2, 2)
    values = np.array([[0.0, 0.0], [1.0, 1.0]]).reshape(1, 1, 2, 2)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (query, keys, values))  # all of them exact
    found = float(attend((q,), (k,), (v,))[0][0, 0, 0, 0])  # scores 128 and 128.5; bfloat16 has steps of 1 there
    assert found == pytest.approx(1 / (1 + np.exp(-0.5)), abs=2**-8)


def test_no_scores_are_kept_for_the_backward_pass():
    pieces = [(jnp.zeros((B, N, 64, K)), jnp.zeros((B, N, 1, K)))] * 3
    _, back = jax.vjp(attend, *pieces)
    assert max(x.size for x in jax.tree.leaves(back)) == B * N * 64 * K


@pytest.mark.full
def test_blocks_make_the_same_of_patches_and_class_token_apart_as_of_both_together(x64):
    tower = ViTTower(image_size=12, patch_size=4, width=24, depth=3, num_heads=2, mlp_dim=40)
    blocks = transformer.stack(transformer.image_block, jax.random.key(0), tower, Compute())
    blocks = jax.tree.map(lambda x: x.astype(jnp.float64), blocks)
    x_BLD, weight_BLD = np.random.default_rng(4).normal(size=(2, B, 10, 24))

    def together(blocks, x_BLD):
        (x_BLD,) = transformer.run(blocks, (x_BLD,), Compute("float64"))
        return (x_BLD * weight_BLD).sum(), x_BLD

    def apart(blocks, x_BLD):
        pieces = transformer.run(blocks, (x_BLD[:, 1:], x_BLD[:, :1]), Compute("float64"))
        x_BLD = jnp.concatenate(pieces[::-1], axis=1)
        return (x_BLD * weight_BLD).sum(), x_BLD

    ways = [jax.jit(jax.grad(way, argnums=(0, 1), has_aux=True))(blocks, x_BLD) for way in (apart, together)]
    for x, expected in zip(*map(jax.tree.leaves, ways), strict=True):
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# --- cuDNN's ---


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """Has XLA compute what cuDNN is asked for: what is given to it and taken from it can be seen without a GPU."""
    genuine, asked = jax.nn.dot_product_attention, []

    def on_any_device(*qkv, implementation, **words):
        assert implementation == "cudnn"
        asked.extend(qkv)
        return genuine(*qkv, implementation="xla", **words)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_any_device)
    return asked


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [L, L - 1])
def test_cudnn_is_asked_for_the_same_with_an_even_number_of_positions(cudnn_by_xla, causal, length):
    q, k, v, d = (jnp.asarray(x[:, :, :length], jnp.float32) for x in heads(0))
    seen = CAUSAL[:length, :length] if causal else None
    found, back = jax.vjp(lambda *qkv: attend_by_cudnn(*qkv, causal=causal), q, k, v)
    for x, expected in zip((found, *back(d)), oracle(q, k, v, d, seen), strict=True):
        np.testing.assert_allclose(x, expected, rtol=0, atol=3e-6)
    assert {qkv.shape[1] for qkv in cudnn_by_xla} == {2 * -(-length // 2)}


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("attention", 1), ("full", 2)])
def test_results_of_cudnn_are_kept_by_the_policy_that_keeps_attention(monkeypatch, remat, times):
    """In what is to be compiled: cuDNN itself is on a GPU only."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *_: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    definition = Definition(VARIANTS["ViT-W64/4@16px"], Compute(dtype="bfloat16", remat=remat, attention="cudnn"))
    weights = jax.eval_shape(definition.init, jax.random.key(0))

    def total(params, tokens):
        return definition.bind(Weights(params, {})).encode_text(tokens).astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(total))(weights.params, jnp.ones((2, 16), jnp.int32)))
    assert text.count(f"= {CUDNN}[") == times


def test_a_model_on_cudnn_has_the_embeddings_of_one_on_xla(cudnn_by_xla):
    weights = jax.jit(Definition(VARIANTS["ViT-W64/4@16px"]).init)(jax.random.key(0))
    random = np.random.default_rng(0)
    image_BHWC = jnp.asarray(random.normal(size=(2, 16, 16, 3)), jnp.float32)
    tokens_BL = jnp.asarray(random.integers(1, 999, (2, 16)), jnp.int32)
    for encode, inputs in (("encode_image", image_BHWC), ("encode_text", tokens_BL)):
        xla, cudnn = (
            getattr(Definition(VARIANTS["ViT-W64/4@16px"], Compute(attention=word)).bind(weights), encode)(inputs)
            for word in ("xla", "cudnn")
        )
        np.testing.assert_allclose(cudnn, xla, rtol=0, atol=1e-5)
