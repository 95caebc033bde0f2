"""The softmax loss, value and gradients, against analytic NumPy in float64; and who found whom, in both losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracles import EPS, accuracies, pairs, softmax

from clip_jax import losses


@jax.jit
def value_and_gradients(img, txt, scale, valid):
    def loss(img, txt, scale):
        return losses.softmax(img, txt, scale=scale, valid_B=valid).loss

    return jax.value_and_grad(loss, (0, 1, 2))(img, txt, scale)


def assert_true(img, txt, scale, valid, *, bound: float) -> None:
    """Checks the loss and all gradients, each relative to its largest entry."""
    loss, (img_grads, txt_grads, scale_grad) = value_and_gradients(img, txt, scale, valid)
    truth = softmax(img, txt, float(scale), np.asarray(valid))
    assert abs(loss - truth.loss) <= bound * truth.loss
    np.testing.assert_allclose(img_grads, truth.img, rtol=0, atol=bound * np.abs(truth.img).max())
    np.testing.assert_allclose(txt_grads, truth.txt, rtol=0, atol=bound * np.abs(truth.txt).max())
    assert abs(scale_grad - truth.scale) <= bound * truth.scale_terms


ALL = jnp.ones(32, bool)
START = jnp.float32(1 / 0.07)


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_within_1e_6_of_float64_at_clips_temperature(seed):
    assert_true(*pairs(seed), START, ALL, bound=1e-6)


@pytest.mark.parametrize("scale", [1, 1 / 0.07, 100])
@pytest.mark.parametrize("noise", [None, 1.0])
def test_with_float64_embeddings_loss_and_gradients_are_float64(x64, scale, noise):
    # cosines are known to about an eps, and are multiplied by the scale before they are exponentiated
    img, txt = pairs(0, noise=noise, dtype=jnp.float64)
    assert value_and_gradients(img, txt, jnp.float64(scale), ALL)[0].dtype == jnp.float64
    assert_true(img, txt, jnp.float64(scale), ALL, bound=1e-12)


@pytest.mark.parametrize("scale", [1, 1 / 0.07, 100])
@pytest.mark.parametrize("noise", [None, 1.0, 0.3])
def test_float32_gives_what_its_cosines_allow_also_when_nearly_every_pair_is_found(scale, noise):
    # A cosine of E terms is off by about √E/2 eps, a logit by scale times that, exp(difference of two) by twice that.
    img, txt = pairs(1, noise=noise)
    assert_true(img, txt, jnp.float32(scale), ALL, bound=max(1e-6, scale * 64**0.5 * EPS))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1, 100), valid=st.lists(st.booleans(), min_size=12, max_size=12))
def test_any_mask_gives_the_batch_without_the_pairs_that_are_not_valid(seed, scale, valid):
    img, txt = pairs(seed, size=12, width=16)
    assert_true(img, txt, jnp.float32(scale), jnp.asarray(valid), bound=max(1e-6, 2 * scale * 16**0.5 * EPS))


@pytest.mark.parametrize("valid", [[], [5]], ids=["none", "one"])
def test_with_no_valid_pair_or_a_single_one_loss_and_gradients_are_zero(valid):
    mask = jnp.zeros(32, bool).at[jnp.array(valid, int)].set(True)
    loss, gradients = value_and_gradients(*pairs(0), START, mask)
    assert loss == 0
    assert not any(np.any(x) for x in gradients), "zero, and not NaN"


def test_pairs_that_are_not_valid_may_hold_anything():
    img, txt = pairs(0)
    valid = ALL.at[3].set(False).at[17].set(False)
    found = value_and_gradients(img.at[3].set(1e6), txt.at[17].set(-1e6), START, valid)
    jax.tree.map(np.testing.assert_array_equal, found, value_and_gradients(img, txt, START, valid))


def test_bfloat16_embeddings_are_scored_in_float32():
    img, txt = pairs(0, dtype=jnp.bfloat16)
    loss = losses.softmax(img, txt, scale=START, valid_B=ALL).loss
    assert loss.dtype == jnp.float32
    wide = losses.softmax(jnp.float32(img), jnp.float32(txt), scale=START, valid_B=ALL).loss
    np.testing.assert_array_equal(loss, wide)


def test_images_and_texts_may_change_places():
    img, txt = pairs(0)
    one, other = (losses.softmax(a, b, scale=START, valid_B=ALL).loss for a, b in ((img, txt), (txt, img)))
    np.testing.assert_allclose(one, other, rtol=2 * EPS)


# --- who found whom ---


def found(kind: str, img, txt, valid) -> tuple[float, float]:
    bias = {"bias": jnp.float32(-10)} if kind == "sigmoid" else {}
    _, *accuracies = getattr(losses, kind)(img, txt, scale=START, valid_B=jnp.asarray(valid), **bias)
    return tuple(accuracy.item() for accuracy in accuracies)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("noise", [None, 4.0, 0.3])
def test_accuracies_are_the_shares_of_images_and_texts_that_are_nearest_to_their_own(kind, noise):
    img, txt = pairs(0, noise=noise)
    valid = np.random.default_rng(1).random(32) < 0.8
    truth = accuracies(img, txt, valid)
    assert found(kind, img, txt, valid) == pytest.approx(truth)
    assert all(share == 1 if noise == 0.3 else 0 < share < 1 for share in truth)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_two_equal_texts_are_not_told_apart_unless_one_is_not_valid(kind):
    img, txt = pairs(0, noise=0.3)
    txt = txt.at[5].set(txt[9])
    assert found(kind, img, txt, ALL) == pytest.approx((30 / 32, 31 / 32))  # text 5 is nearer to image 9
    assert found(kind, img, txt, ALL.at[5].set(False)) == (1, 1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_without_valid_pairs_nothing_is_found_and_a_single_one_finds_itself(kind):
    none = jnp.zeros(32, bool)
    assert found(kind, *pairs(0), none) == (0, 0)
    assert found(kind, *pairs(0), none.at[4].set(True)) == (1, 1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_model_whose_embeddings_are_not_finite_finds_nothing(kind):
    img, txt = pairs(0, noise=0.3)
    assert found(kind, img * jnp.nan, txt, ALL) == (0, 0)
