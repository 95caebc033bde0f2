"""The linear probe: what it draws, what it finds, what it refuses."""

import functools
import math

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from clip_jax import sharding
from clip_jax.config import MeshConfig
from clip_jax.errors import UserError
from clip_jax.evaluation import linear_probe, logistic, zero_shot
from clip_jax.evaluation.linear_probe import Labelled, probe, split


@functools.cache
def scans() -> tuple[Labelled, Labelled]:
    """A third of the embedded scans to learn from, and a third to test with."""
    pixels, labels = load_digits(return_X_y=True)
    features = (pixels / 16).astype(np.float32)
    return Labelled(features[::3], labels[::3]), Labelled(features[1::3], labels[1::3])


def clouds(*sizes: int, width: int = 8) -> Labelled:
    """Returns so many examples of every class around its own corner."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    noise = np.random.default_rng(0).normal(size=(len(labels), width))
    return Labelled((2 * np.eye(width)[labels % width] + noise).astype(np.float32), labels)


def rows_of(part: Labelled, whole: Labelled) -> list[int]:
    """Returns which of the whole's examples these are; no two of them are equal."""
    return [int(np.flatnonzero((whole.features == row).all(axis=1))[0]) for row in part.features]


def test_metrics_are_those_of_clip_benchmark_and_say_what_the_final_classifier_does():
    train, test = scans()
    found = probe(train, None, test, classes=10)
    assert tuple(found.metrics) == (*linear_probe.METRICS, "weight_decay", "epochs", "seed", "fewshot_k")
    assert found.metrics["lp_acc1"] > 0.9
    scores = logistic.scores(found.linear, test.features)
    best, everywhere = np.argsort(-scores, axis=1)[:, :5], np.arange(len(scores))
    labels = test.labels.astype(np.int32)
    expected = zero_shot.metrics(
        zero_shot.Predictions(best.astype(np.int32), labels, np.ones(len(scores), np.float32), everywhere, 10)
    )
    assert [found.metrics[f"lp_{name}"] for name in zero_shot.METRICS] == [expected[n] for n in zero_shot.METRICS]
    assert (found.metrics["seed"], found.metrics["fewshot_k"]) == (0, -1)
    # It is scikit-learn's for that λ, of train and what was held out of it.
    best, accuracy = max(found.swept, key=lambda swept: (swept[1], swept[0]))
    assert found.metrics["weight_decay"] == best
    assert accuracy > 0.9
    middle = train.features.mean(axis=0, dtype=np.float64)  # less it, scikit-learn is there sooner
    model = LogisticRegression(C=1 / best, tol=1e-10, max_iter=10_000).fit(train.features - middle, train.labels)
    assert (found.best[:, 0] == model.predict(test.features - middle)).mean() >= 0.999
    shares = model.predict_proba(test.features - middle)
    np.testing.assert_allclose(found.confidence, shares.max(axis=1), atol=1e-3)


def test_best_are_the_five_best_classes_in_order_and_confidence_is_the_firsts_probability():
    train, test = scans()
    found = probe(train, train, test, classes=10, fewshot_k=2)
    scores = logistic.scores(found.linear, test.features)
    np.testing.assert_array_equal(found.best, np.argsort(-scores, axis=1)[:, :5])
    share = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.confidence, share.max(axis=1), rtol=1e-9)


def test_under_five_classes_there_is_no_acc5():
    found = probe(clouds(9, 9, 9), None, clouds(3, 3, 3), classes=3)
    assert math.isnan(found.metrics["lp_acc5"])
    assert found.best.shape == (9, 3)


class Peaked:
    """Stands for a problem whose classifiers do best at one λ: keeps what it was asked for."""

    def __init__(self, peak: float):
        self.peak, self.asked = peak, []

    def fit(self, c, start=None):
        self.asked.append(1 / c)
        return logistic.Fitted(logistic.Linear(np.array([[-math.log10(c) - self.peak]]), np.zeros(1)), 1)


@pytest.mark.parametrize("peak", [-6.0, -4.625, 0.0, 0.375, 3.0, 5.875, 6.0])
def test_the_search_finds_any_peak_of_eight_steps_a_decade_in_fifteen_fits(peak, monkeypatch):
    asked = Peaked(peak)
    monkeypatch.setattr(logistic, "Problem", lambda *_, **__: asked)
    # As many of 1000 are right as the peak is near.
    monkeypatch.setattr(
        linear_probe, "judged", lambda linear, _: linear_probe.Judged(1000 - 80 * abs(linear.weight[0, 0]), 0.0)
    )
    told = []
    nothing = Labelled(np.zeros((1000, 1), np.float32), np.zeros(1000, int))
    search = linear_probe._Search(linear_probe.Split(nothing, nothing, nothing), 2, None, lambda *x: told.append(x))
    search.run()
    assert linear_probe._lambda(search.peak) == pytest.approx(10**peak)
    assert asked.asked[:7] == pytest.approx([1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6])
    assert len(asked.asked) == len(set(asked.asked)) <= linear_probe.FITS == 15
    assert told == [(done + 1, 16) for done in range(15)]


def test_progress_is_told_to_the_end():
    told = []
    probe(clouds(9, 9, 9), None, clouds(3, 3, 3), classes=3, progress=lambda *x: told.append(x))
    assert told == [(done + 1, 16) for done in range(16)]


def test_a_classifier_is_judged_by_what_it_has_right_and_then_by_how_likely_it_finds_the_labels():
    train, test = scans()
    linear = logistic.fit(*train, 10, 0.1).linear
    found, scores = linear_probe.judged(linear, test), logistic.scores(linear, test.features)
    assert found.accuracy == (scores.argmax(axis=1) == test.labels).mean()
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    assert found.likelihood == pytest.approx(np.log(shares[np.arange(len(shares)), test.labels]).mean())
    assert linear_probe.Judged(0.9, -2.0) > linear_probe.Judged(0.8, -0.1) > linear_probe.Judged(0.8, -0.2)


def test_of_lambdas_with_which_all_is_right_the_surest_is_taken():
    corners = Labelled((100 * np.eye(3, dtype=np.float32))[np.arange(30) % 3], np.arange(30) % 3)
    found = probe(corners, None, corners, classes=3)
    assert {accuracy for _, accuracy in found.swept} == {1.0}
    assert found.metrics["weight_decay"] < 1
    assert found.confidence.min() > 0.999


def test_a_fifth_of_every_class_is_held_out_and_all_of_train_is_trained_on():
    train = clouds(10, 2, 1, 25)
    found = split(train, None, classes=5)
    assert np.bincount(found.validation.labels).tolist() == [2, 1, 0, 5]
    assert sorted(rows_of(found.train, train) + rows_of(found.validation, train)) == list(range(38))
    assert found.final is train


def test_a_validation_set_is_judged_by_and_then_trained_on():
    train, validation = clouds(3, 3), clouds(2, 4)
    found = split(train, validation, classes=2)
    assert found.train is train
    assert found.validation is validation
    np.testing.assert_array_equal(found.final.features, np.concatenate([train.features, validation.features]))
    np.testing.assert_array_equal(found.final.labels, np.concatenate([train.labels, validation.labels]))


@pytest.mark.parametrize(("k", "more"), [(1, 1), (2, 2), (4, 4), (6, 4)])
def test_few_shot_learns_from_k_of_a_class_alone_and_judges_by_others(k, more):
    train = clouds(10, 12, 11)
    found = split(train, None, classes=3, fewshot_k=k)
    assert np.bincount(found.final.labels).tolist() == [k] * 3
    assert np.bincount(found.validation.labels).tolist() == [more] * 3
    assert found.train is found.final
    assert not {*rows_of(found.final, train)} & {*rows_of(found.validation, train)}


def test_few_shot_with_a_validation_set_judges_by_it_and_learns_nothing_of_it():
    train, validation = clouds(2, 2), clouds(5, 5)
    found = split(train, validation, classes=2, fewshot_k=2)
    assert found.validation is validation
    assert rows_of(found.final, train) == [0, 1, 2, 3]


def test_the_seed_draws_and_more_shots_hold_the_fewer():
    train = clouds(20, 20)
    shots = {
        (k, seed): rows_of(split(train, None, classes=2, fewshot_k=k, seed=seed).final, train)
        for k in (2, 4, 8)
        for seed in (0, 1)
    }
    assert {*shots[2, 0]} < {*shots[4, 0]} < {*shots[8, 0]}
    assert shots[4, 0] != shots[4, 1]
    assert shots[4, 0] == rows_of(split(train, None, classes=2, fewshot_k=4).final, train)


@pytest.mark.full
def test_the_devices_probe_finds_what_the_hosts_does(monkeypatch):
    train, test = (Labelled(x.features[:200], x.labels[:200]) for x in scans())
    host = probe(train, None, test, classes=10)
    monkeypatch.setattr(logistic, "HOST_WORK", 0)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices())
    devices = probe(train, None, test, classes=10, mesh=mesh)
    for name in (*linear_probe.METRICS, "weight_decay"):
        assert devices.metrics[name] == host.metrics[name]
    assert devices.swept == host.swept


GOOD = clouds(6, 6, 6)


def labelled(labels: list[int], width: int = 8) -> Labelled:
    return Labelled(np.zeros((len(labels), width), np.float32), np.array(labels, int))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test": labelled([0, 3, -1])}, "test has labels -1, 3, and of 3 classes they must be 0 to 2"),
        ({"train": labelled([])}, "train has no examples"),
        ({"validation": labelled([])}, "validation has no examples"),
        (
            {"train": Labelled(np.full_like(GOOD.features, np.nan), GOOD.labels)},
            "18 of 18 features of train are not finite",
        ),
        ({"train": labelled([1, 1])}, "train has class 1 alone"),
        ({"test": labelled([0], 7)}, "features of test have 7 dimensions and those of train 8"),
        ({"train": labelled([0, 1, 2])}, "no class of train has two examples, so none can be held out: give a valid"),
        ({"fewshot_k": 0}, "fewshot_k=0 must be examples a class, 1 or more, or -1 for all"),
        ({"fewshot_k": 7}, "takes 7 of every class; of train class 0 has 6, class 1 has 6, class 2 has 6: take a sm"),
        ({"fewshot_k": 1, "classes": 4}, "class 3 has 0"),
        ({"fewshot_k": 4}, "and 4 more to look for λ with; of train class 0 has 6, .*: give a validation set"),
    ],
)
def test_what_cannot_be_probed_is_refused_with_the_next_move(change, words):
    given = {"train": GOOD, "validation": None, "test": GOOD, "classes": 3} | change
    with pytest.raises(UserError, match=words):
        probe(given.pop("train"), given.pop("validation"), given.pop("test"), **given)
