"""The numbers of an evaluation against brute force."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from clip_jax import sharding
from clip_jax.config import MeshConfig
from clip_jax.evaluation import retrieval, zero_shot
from clip_jax.evaluation.encode import encode_texts


def predictions(best, labels, classes: int) -> zero_shot.Predictions:
    n = len(labels)
    best, labels = np.array(best, np.int32), np.array(labels, np.int32)
    return zero_shot.Predictions(best, labels, np.ones(n, np.float32), np.arange(n), classes)


def test_classification_metrics_equal_counting_by_hand():
    found = zero_shot.metrics(predictions([[0, 1, 2], [1, 0, 2], [0, 1, 2], [2, 1, 0]], [0, 1, 1, 2], classes=3))
    assert found["acc1"] == 3 / 4
    assert found["mean_per_class_recall"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert math.isnan(found["acc5"]), "under five classes there is no acc5"


def test_acc5_equals_sorting_every_row():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(200, 9)), random.integers(0, 9, 200)
    expected = np.mean([label in np.argsort(-row)[:5] for row, label in zip(scores, labels, strict=True)])
    best = np.argsort(-scores, axis=1)[:, :5]
    assert zero_shot.metrics(predictions(best, labels, classes=9))["acc5"] == expected


def sorted_ranks(txt: np.ndarray, img: np.ndarray, image_of_text: np.ndarray) -> retrieval.Ranks:
    """Returns the ranks by sorting the whole matrix, among equals the earlier first."""
    scores = txt @ img.T
    by_text = [list(np.argsort(-row, kind="stable")).index(i) for row, i in zip(scores, image_of_text, strict=True)]
    orders = [list(image_of_text[np.argsort(-column, kind="stable")]) for column in scores.T]
    return retrieval.Ranks(np.array(by_text), np.array([order.index(i) for i, order in enumerate(orders)]))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("images", [1, 7, 101])
@pytest.mark.parametrize("blocks", [(2, 3), (retrieval.TEXTS, retrieval.IMAGES)])
def test_ranks_are_those_of_sorting_whatever_the_blocks_devices_and_ties(blocks, images, devices, monkeypatch):
    monkeypatch.setattr(retrieval, "TEXTS", blocks[0])
    monkeypatch.setattr(retrieval, "IMAGES", blocks[1])
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    random = np.random.default_rng(images)
    image_of_text = random.permutation(np.repeat(np.arange(images), random.integers(1, 6, images)))
    # Small integers: cosines are exact, and many are equal; so are whole embeddings.
    txt, img = (random.integers(-1, 2, (n, 4)).astype(np.float32) for n in (len(image_of_text), images))
    found, expected = retrieval.ranks(txt, img, image_of_text, mesh), sorted_ranks(txt, img, image_of_text)
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.texts, expected.texts)


def test_an_image_that_no_text_is_of_has_all_texts_before_its_own():
    found = retrieval.ranks(np.eye(3, dtype=np.float32), np.eye(4, dtype=np.float32)[:, :3], np.array([0, 1, 3]))
    np.testing.assert_array_equal(found.texts, [0, 0, 3, 2])


def test_recall_is_the_share_of_ranks_below_k():
    found = retrieval.metrics(retrieval.Ranks(np.array([0, 0, 3, 7, 20]), np.array([0, 12])))
    assert [found[f"image_retrieval_recall@{k}"] for k in (1, 5, 10)] == [2 / 5, 3 / 5, 4 / 5]
    assert [found[f"text_retrieval_recall@{k}"] for k in (1, 5, 10)] == [1 / 2, 1 / 2, 1 / 2]


def test_a_collapsed_model_to_which_all_is_equal_finds_what_chance_finds():
    same = np.ones((20, 4), np.float32)
    found = retrieval.metrics(retrieval.ranks(same, same, np.arange(20)))
    for way in ("image", "text"):
        assert [found[f"{way}_retrieval_recall@{k}"] for k in (1, 5, 10)] == [1 / 20, 5 / 20, 10 / 20]
    _, best, _ = zero_shot._scored(jnp.ones((20, 4)), jnp.ones((20, 4)), jnp.ones(()))
    chance = zero_shot.metrics(predictions(best, np.arange(20), classes=20))
    assert (chance["acc1"], chance["acc5"]) == (1 / 20, 5 / 20)


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts_of_which_it_may_have_any_number(monkeypatch):
    monkeypatch.setattr(zero_shot, "PROMPTS", 4)  # encoded at once: a class more than that at a time
    model, prompts = tiny.model(), [["a cat", "the cat!"], ["horse"], ["a", "b", "c", "d", "e"], ["dog", "a dog"]]
    found = zero_shot.classifier(model, prompts)
    for row, sentences in zip(found, prompts, strict=True):
        mean = encode_texts(model, sentences).mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)
