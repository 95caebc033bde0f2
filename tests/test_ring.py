"""The ring: the same losses, gradients and finds as dense float64, on any number of devices, in memory that grows with
B."""

import functools
import re

import jax
import jax.numpy as jnp
import loss_oracles
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import losses, sharding
from clip_jax.config import LossConfig, MeshConfig
from clip_jax.errors import UserError

AXES = ("data", "fsdp")
SIZE, WIDTH = 48, 64  # pairs: 6 a device on 8 devices
KINDS = ("random", "aligned", "collapsed", "identical", "orthogonal")
BIAS = -10.0
# (devices on the axes data, fsdp, tensor; tile): several tiles, tiles that do not divide the block, one of it all
RINGS = [
    *[((1, 1, 1), tile) for tile in (48, 16, 7)],
    *[((2, 1, 1), tile) for tile in (24, 5)],
    *[((1, 4, 1), tile) for tile in (12, 5)],
    *[((8, 1, 1), tile) for tile in (6, 4, 1)],
    ((2, 4, 1), 3),
    ((2, 2, 2), 5),  # devices that share a place on the tensor axis do the same
]


def ring(sizes: tuple[int, int, int], tile: int) -> losses.Ring:
    return losses.Ring(sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)]), AXES, tile)


@functools.cache
def value_and_gradients(kind: str, around: losses.Ring | None):
    """Returns the compiled (loss, accuracies), and the loss's gradients by (img, txt, scale, bias); the softmax has no
    bias."""

    def softmax(img, txt, scale, bias, valid):
        loss, *accuracies = losses.softmax(img, txt, scale=scale, valid_B=valid, ring=around)
        return loss, accuracies

    def sigmoid(img, txt, scale, bias, valid):
        loss, *accuracies = losses.sigmoid(img, txt, scale=scale, bias=bias, valid_B=valid, ring=around)
        return loss, accuracies

    return jax.jit(jax.value_and_grad({"softmax": softmax, "sigmoid": sigmoid}[kind], (0, 1, 2, 3), has_aux=True))


def assert_true(kind, around, img, txt, scale: float, valid, *, relative: float, floor: float) -> None:
    """Checks the value and all gradients: embeddings' by their largest, with floors where the truth is nothing; and who
    found whom."""
    (found, accuracies), (img_grad, txt_grad, scale_grad, bias_grad) = value_and_gradients(kind, around)(
        img, txt, jnp.asarray(scale, img.dtype), jnp.asarray(BIAS, img.dtype), jnp.asarray(valid)
    )
    arguments = (scale, valid) if kind == "softmax" else (scale, BIAS, valid)
    truth = getattr(loss_oracles, kind)(img, txt, *arguments)
    np.testing.assert_allclose(
        accuracies, loss_oracles.accuracies(img, txt, valid, jnp.finfo(img.dtype).eps), rtol=1e-6
    )
    assert all(np.isfinite(x).all() for x in (found, img_grad, txt_grad, scale_grad, bias_grad))
    assert abs(found - truth.loss) <= relative * truth.loss + floor * scale
    for gradient, expected in ((img_grad, truth.img), (txt_grad, truth.txt)):
        bound = relative * np.abs(expected).max() + floor * scale / len(valid)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=bound)
    assert abs(scale_grad - truth.scale) <= relative * abs(truth.scale) + floor
    assert abs(bias_grad - (truth.bias or 0)) <= relative * abs(truth.bias or 0) + floor


def some_valid(size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(3).random(size) < 0.8


@pytest.mark.parametrize("embeddings", KINDS)
@pytest.mark.parametrize(("sizes", "tile"), RINGS)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_ring_is_within_1e_5_of_dense_float64(kind, sizes, tile, embeddings):
    img, txt = loss_oracles.embeddings(embeddings, SIZE, WIDTH, jnp.float32)
    for scale in (1.0, 1 / 0.07, 100.0):
        for valid in (np.ones(SIZE, bool), some_valid()):
            assert_true(kind, ring(sizes, tile), img, txt, scale, valid, relative=1e-5, floor=1e-6)


@pytest.mark.parametrize("embeddings", KINDS)
@pytest.mark.parametrize(("sizes", "tile"), [((1, 1, 1), 7), ((8, 1, 1), 4), ((2, 2, 2), 5)])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_with_float64_embeddings_the_ring_is_float64(x64, kind, sizes, tile, embeddings):
    img, txt = loss_oracles.embeddings(embeddings, SIZE, WIDTH, jnp.float64)
    for scale in (1.0, 1 / 0.07, 100.0):
        assert_true(kind, ring(sizes, tile), img, txt, scale, some_valid(), relative=1e-12, floor=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(scale=st.floats(1, 100), valid=st.lists(st.booleans(), min_size=16, max_size=16), seed=st.integers(0, 2**32 - 1))
def test_any_mask_gives_the_batch_without_the_pairs_that_are_not_valid(kind, seed, scale, valid):
    img, txt = loss_oracles.pairs(seed, size=16, width=8)
    assert_true(kind, ring((4, 2, 1), 2), img, txt, scale, np.array(valid), relative=1e-5, floor=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("width", [1, 3, 100, 768])
def test_embeddings_may_have_any_width(kind, width):
    img, txt = loss_oracles.pairs(0, size=SIZE, width=width)
    assert_true(kind, ring((2, 2, 1), 5), img, txt, 1 / 0.07, some_valid(), relative=1e-5, floor=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_pairs_that_are_not_valid_may_hold_anything(kind):
    img, txt = loss_oracles.pairs(0, size=SIZE)
    valid, f = jnp.ones(SIZE, bool).at[3].set(False).at[17].set(False), value_and_gradients(kind, ring((8, 1, 1), 4))
    found = f(img.at[3].set(jnp.nan), txt.at[17].set(jnp.inf), jnp.float32(14), jnp.float32(BIAS), valid)
    expected = f(img, txt, jnp.float32(14), jnp.float32(BIAS), valid)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_ring_is_the_dense_form_under_another_weighting_of_the_loss(kind):
    """What comes back through the loss is multiplied in, not taken for one."""
    img, txt = loss_oracles.pairs(0, size=SIZE)

    def gradients(around):
        def loss(img, txt):
            one = {"softmax": losses.softmax, "sigmoid": functools.partial(losses.sigmoid, bias=jnp.float32(BIAS))}[
                kind
            ]
            return 3 * one(img, txt, scale=jnp.float32(14), valid_B=jnp.ones(SIZE, bool), ring=around).loss ** 2

        return jax.jit(jax.grad(loss, (0, 1)))(img, txt)

    for found, expected in zip(gradients(ring((8, 1, 1), 4)), gradients(None), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("embeddings", KINDS)
def test_the_dense_sigmoid_is_within_1e_5_of_float64(embeddings):
    img, txt = loss_oracles.embeddings(embeddings, SIZE, WIDTH, jnp.float32)
    for scale in (1.0, 1 / 0.07, 100.0):
        assert_true("sigmoid", None, img, txt, scale, some_valid(), relative=1e-5, floor=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("sizes", "tile"), RINGS)
def test_equals_are_not_found_wherever_they_meet_and_a_collapsed_model_finds_nothing(kind, sizes, tile):
    img, txt = loss_oracles.pairs(0, size=SIZE, noise=0.2)

    def found(img, txt):
        arguments = img, txt, jnp.float32(14), jnp.float32(BIAS), jnp.ones(SIZE, bool)
        return [accuracy.item() for accuracy in value_and_gradients(kind, ring(sizes, tile))(*arguments)[0][1]]

    assert found(img, txt) == [1, 1]
    texts = found(img, txt.at[40].set(txt[1]).at[4].set(txt[3]))
    images = found(img.at[40].set(img[1]).at[4].set(img[3]), txt)
    assert texts == images[::-1] == pytest.approx([44 / 48, 46 / 48])
    assert found(*loss_oracles.embeddings("identical", SIZE, WIDTH, jnp.float32)) == [0, 0]


# --- what is compiled ---


def compiled(kind: str, batch: int, devices: int, width: int = 768) -> jax.stages.Compiled:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    around = losses.Ring(mesh, AXES, losses.tile_of(batch // devices))

    def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        spec = P(AXES) if sizes else P()
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    embeddings, scalar = shape(batch, width), shape()
    arguments = (embeddings, embeddings, scalar, scalar, shape(batch, dtype=bool))
    return value_and_gradients(kind, around).lower(*arguments).compile()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_on_8_devices_nothing_is_gathered_and_nothing_as_large_as_a_devices_logits_is_kept(kind):
    batch, devices = 32768, 8
    program = compiled(kind, batch, devices)
    text = program.as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)]
    assert max(sizes) < batch // devices * batch / 8
    assert program.memory_analysis().temp_size_in_bytes <= 0.1e9


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_memory_grows_with_the_batch_and_one_device_holds_65536_in_half_a_gigabyte(kind):
    small, large = (compiled(kind, b, 8).memory_analysis().temp_size_in_bytes for b in (2**17, 2**20))
    assert 7 < large / small < 9
    assert compiled(kind, 65536, 1).memory_analysis().temp_size_in_bytes <= 0.5e9


# --- which form a run takes ---


def form(devices: int, batch: int, **config) -> losses.Ring | None:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    return losses.ring_for(LossConfig(**config), mesh, AXES, batch)


def test_a_tile_larger_than_a_devices_block_is_refused_with_the_block():
    with pytest.raises(UserError, match=r"loss.tile=9 is larger than a device's block of 8 pairs.*make it 8 at most"):
        form(8, 64, form="ring", tile=9)
    assert form(8, 64, form="ring", tile=8).tile == 8


@pytest.mark.parametrize(("devices", "batch"), [(1, 4096), (8, 8192), (8, 11_584)])
def test_auto_is_dense_where_a_device_has_few_logits_unless_a_tile_is_given(devices, batch):
    assert form(devices, batch) is None
    assert form(devices, 2 * batch).tile <= losses.TILE
    assert form(devices, batch, tile=128).tile == 128
    assert form(devices, 2 * batch, form="dense") is None


def test_auto_is_a_ring_where_no_device_can_have_all_texts(monkeypatch):
    monkeypatch.setattr(losses, "DENSE_PAIRS", 512)
    assert form(8, 512) is None
    assert form(8, 1024).tile == 128
