"""A data set through a model: every record once, on any devices, and nothing that is bad ends it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from clip_jax.data.sources import Record
from clip_jax.data.transforms import decode, evaluation_crop
from clip_jax.errors import UserError
from clip_jax.evaluation import encode, on_mesh
from clip_jax.evaluation.encode import Images, encode_texts
from clip_jax.models.clip import Definition, l2_normalise, normalise_pixels


def embedded(model, source, feature: str = "embedding") -> tuple[np.ndarray, list[int], list[Record]]:
    parts = list(Images(model, source, feature=feature))
    features = [model.gathered(part.features)[part.rows] for part in parts]
    index = [i for part in parts for i in part.index.tolist()]
    return np.concatenate(features), index, [record for part in parts for record in part.records]


def computed(source, indices) -> np.ndarray:
    """Returns the embeddings by the model itself, image by image."""
    bundle = tiny.bundle()
    definition, arch = Definition(bundle.architecture), bundle.architecture
    model = definition.bind(tiny.model().weights)
    crops = [evaluation_crop(decode(source[i].image), arch.image.image_size, arch.preprocess) for i in indices]
    pixels = jnp.asarray(normalise_pixels(np.stack(crops), arch.preprocess))
    return np.asarray(l2_normalise(model.encode_image(pixels)))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_every_image_is_encoded_once_in_order_whatever_the_devices(length, devices):
    source = tiny.Memory(length)
    features, index, records = embedded(tiny.model(devices), source)
    assert index == list(range(length))
    assert records == [source[i]._replace(image=b"") for i in range(length)]
    np.testing.assert_allclose(features, computed(source, range(length)), atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_images_that_cannot_be_read_are_counted_and_the_others_stay_in_their_places(devices):
    source = tiny.Memory(13, damaged=(0, 5, 12))
    images = Images(tiny.model(devices), source)
    index = np.concatenate([part.index for part in images])
    assert index.tolist() == [i for i in range(13) if i not in source.damaged]
    assert images.left_out == {"damaged image": 3}
    features, *_ = embedded(tiny.model(devices), source)
    np.testing.assert_allclose(features, computed(source, index), atol=1e-6)


def test_a_data_set_of_which_nothing_can_be_read_is_refused():
    source = tiny.Memory(3, damaged=(0, 1, 2))
    with pytest.raises(UserError, match="no image of memory:test can be read: damaged image 3"):
        list(Images(tiny.model(), source))


def test_features_before_the_projection_times_it_are_those_behind():
    model, source = tiny.model(), tiny.Memory(5)
    pooled, *_ = embedded(model, source, "pooled")
    projected, *_ = embedded(model, source, "projected")
    embedding, *_ = embedded(model, source)
    assert pooled.shape[1] == model.architecture.image.width
    np.testing.assert_allclose(pooled @ tiny.bundle().arrays["image/projection"], projected, atol=1e-5)
    np.testing.assert_allclose(projected / np.linalg.norm(projected, axis=1, keepdims=True), embedding, atol=1e-6)


TEXTS = ["a cat", "a very long caption " * 30, "", "dogs, and dogs", "a cat"]  # the tiny model's context is 16


@pytest.mark.parametrize("devices", [1, 8])
def test_texts_are_computed_as_far_as_they_are_long_with_the_results_of_all(devices, monkeypatch):
    monkeypatch.setattr(on_mesh, "TEXT_LENGTHS", (4, 10, 40))
    model = tiny.model(devices)
    found = encode_texts(model, TEXTS)
    tokens = model.tokenize(TEXTS)
    assert sorted(set(model.text_lengths(tokens).tolist())) == [4, 10, 16]
    whole = Definition(model.architecture).bind(tiny.model().weights).encode_text(jnp.asarray(tokens))
    np.testing.assert_allclose(found, l2_normalise(whole), atol=1e-6)
    np.testing.assert_array_equal(found[0], found[4])


def test_what_another_process_finds_wrong_ends_this_one_too(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(encode.distributed, "gather", lambda mine: [mine, ["record 3 has no label", []]])
    with pytest.raises(UserError, match="record 3 has no label"):
        list(Images(tiny.model(), tiny.Memory(5)))
