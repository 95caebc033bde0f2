"""`clip_jax.load` of a workdir: the same numbers as the model that was trained, in plain words when it cannot."""

import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax.errors import UserError


@pytest.fixture(scope="module")
def loaded(workdir):
    return clip_jax.load(workdir)


@pytest.fixture(scope="module")
def images(loaded):
    _, preprocess = loaded
    random = np.random.default_rng(0)
    return np.stack([preprocess(Image.fromarray(random.integers(0, 256, (30, 20, 3), np.uint8))) for _ in range(3)])


def test_the_calls_of_the_readme_give_features_and_logits(loaded, images):
    model, _ = loaded
    tokens = clip_jax.tokenize(["a handwritten seven", "the number 3"])
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == np.float32
    img, txt = model.encode_image(images), model.encode_text(tokens)
    assert img.shape == (3, 64)
    assert txt.shape == (2, 64)
    per_image, per_text = model(images, tokens)
    img, txt = (np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (img, txt))
    scale = np.exp(float(model.params["logit_scale"]))
    np.testing.assert_allclose(per_image, scale * img @ txt.T, atol=1e-5 * scale)
    np.testing.assert_array_equal(per_text, per_image.T)


def test_tokens_of_the_models_own_context_length_give_the_same_features(loaded):
    model, _ = loaded
    texts = ["a handwritten seven", "one"]
    assert model.tokenize(texts).shape == (2, 16)
    np.testing.assert_array_equal(model.encode_text(model.tokenize(texts)), model.encode_text(clip_jax.tokenize(texts)))


def test_a_caption_longer_than_the_models_context_is_refused(loaded):
    model, _ = loaded
    with pytest.raises(UserError, match="context length 16"):
        model.encode_text(clip_jax.tokenize("a very long caption " * 4))


def test_images_of_another_size_are_refused(loaded):
    model, _ = loaded
    with pytest.raises(UserError, match=r"\[n, 16, 16, 3\]"):
        model.encode_image(np.zeros((1, 224, 224, 3), np.float32))


def test_what_cannot_be_loaded_is_said(tmp_path, workdir):
    with pytest.raises(UserError, match="not a folder"):
        clip_jax.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a run's folder"):
        clip_jax.load(tmp_path)
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    with pytest.raises(UserError, match="no checkpoint"):
        clip_jax.load(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"], "loading writes nothing"
