"""The numbers of an evaluation against brute force."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.evaluation import retrieval, zero_shot


def unit_rows(random: np.random.Generator, n: int) -> np.ndarray:
    x = random.normal(size=(n, 8))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_classification_metrics_equal_counting_by_hand():
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.1], [0.5, 0.4, 0.1], [0.0, 0.1, 0.8]])
    labels = np.array([0, 1, 1, 2])
    found = zero_shot.metrics(zero_shot.Predictions(scores, labels))
    assert found["acc1"] == 3 / 4
    assert found["mean_per_class_recall"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert math.isnan(found["acc5"]), "under five classes there is no acc5"


def test_acc5_equals_sorting_every_row():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(200, 9)), random.integers(0, 9, 200)
    expected = np.mean([label in np.argsort(-row)[:5] for row, label in zip(scores, labels, strict=True)])
    assert zero_shot.metrics(zero_shot.Predictions(scores, labels))["acc5"] == expected


@pytest.mark.parametrize("block", [3, 1024])
def test_ranks_equal_sorting_the_whole_matrix(block, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", block)
    random = np.random.default_rng(1)
    image_of_text = np.repeat(np.arange(20), random.integers(1, 4, 20))
    txt, img = unit_rows(random, len(image_of_text)), unit_rows(random, 20)
    scores = txt @ img.T
    by_text = [list(np.argsort(-scores[t])).index(image_of_text[t]) for t in range(len(txt))]
    orders = [list(image_of_text[np.argsort(-scores[:, i])]) for i in range(20)]
    by_image = [order.index(i) for i, order in enumerate(orders)]
    np.testing.assert_array_equal(retrieval.image_ranks(txt, img, image_of_text), by_text)
    np.testing.assert_array_equal(retrieval.text_ranks(txt, img, image_of_text), by_image)


def test_recall_is_the_share_of_ranks_below_k():
    found = retrieval.metrics(np.array([0, 0, 3, 7, 20]), np.array([0, 12]))
    assert [found[f"image_retrieval_recall@{k}"] for k in (1, 5, 10)] == [2 / 5, 3 / 5, 4 / 5]
    assert [found[f"text_retrieval_recall@{k}"] for k in (1, 5, 10)] == [1 / 2, 1 / 2, 1 / 2]


def test_a_collapsed_model_to_which_all_is_equal_finds_what_chance_finds():
    same, image_of_text = np.ones((20, 4)), np.arange(20)
    found = retrieval.metrics(
        retrieval.image_ranks(same, same, image_of_text), retrieval.text_ranks(same, same, image_of_text)
    )
    for way in ("image", "text"):
        assert [found[f"{way}_retrieval_recall@{k}"] for k in (1, 5, 10)] == [1 / 20, 5 / 20, 10 / 20]
    chance = zero_shot.metrics(zero_shot.Predictions(np.ones((20, 20)), np.arange(20)))
    assert (chance["acc1"], chance["acc5"]) == (1 / 20, 5 / 20)


class TwoWords:
    """An encoder whose embedding of a text is its length and its first letter."""

    pretrained = "nowhere"

    def tokenize(self, texts, truncate=False):
        return np.array([[len(text), ord(text[0])] for text in texts], np.int32)

    def encode_text(self, tokens):
        return jnp.asarray(tokens, jnp.float32) + 1e-3  # padding has a direction, too


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts():
    names, templates = ["cat", "horse"], ["a {}", "the {}!", "{}"]
    found = zero_shot.classifier(TwoWords(), names, templates)
    for row, name in zip(found, names, strict=True):
        prompts = np.array([[len(t.format(name)), ord(t.format(name)[0])] for t in templates]) + 1e-3
        mean = (prompts / np.linalg.norm(prompts, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-6)
