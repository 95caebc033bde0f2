"""The linear probe: how well a linear classifier of frozen features does (CLIP, section 3.2 and appendix A.3).

L-BFGS logistic regression, its λ looked for on a validation split: over 97 values from 1e-6 to 1e6, eight a decade, of
which the search fits seven, two decades apart, and then halves the interval around the best until they are neighbours.
Of λ that are right equally often, the one that finds validation's labels likelier is better. With the best the
classifier is trained on train and validation together; few-shot, on the shots alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from scipy.special import logsumexp

from clip_jax.errors import UserError
from clip_jax.evaluation import logistic
from clip_jax.evaluation.logistic import Linear
from clip_jax.evaluation.zero_shot import BEST, accuracies
from clip_jax.typing import Float, Int

METRICS = ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall")  # in results followed by how it was trained
# λ = 10 ** (place / 8)
STEPS_PER_DECADE = 8
LARGEST = 6 * STEPS_PER_DECADE  # 1e6; the smallest is its reciprocal
COARSE = 2 * STEPS_PER_DECADE
FITS = 2 * LARGEST // COARSE + 1 + 2 * (COARSE.bit_length() - 1)  # of a search, at most
HELD_OUT = 1 / 5  # of a class, where there is no validation set
SHOTS_HELD_OUT = 4  # of a class, at most: CoOp's protocol (arXiv 2109.01134)
ROWS = 4096  # examples that are scored at once

Progress = Callable[[int, int | None], None]


class Labelled(NamedTuple):
    """Features, which a model has made, and what they are of."""

    features: Float[np.ndarray, "B E"]  # float32
    labels: Int[np.ndarray, " B"]


class Split(NamedTuple):
    """Which examples are for what."""

    train: Labelled  # λ is looked for with classifiers of these,
    validation: Labelled  # judged by these;
    final: Labelled  # and the classifier is trained on these


class Ranked(NamedTuple):
    """What a classifier takes examples for."""

    best: Int[np.ndarray, "n best"]  # min(5, classes) of the classes, the best first
    confidence: Float[np.ndarray, " n"]  # the probability of the best


class Probed(NamedTuple):
    """A trained probe, and how it did on the test set."""

    metrics: dict[str, float]
    linear: Linear
    best: Int[np.ndarray, "n best"]
    confidence: Float[np.ndarray, " n"]
    swept: list[tuple[float, float]]  # (λ, accuracy on validation), the smallest λ first


def probe(
    train: Labelled,
    validation: Labelled | None,
    test: Labelled,
    *,
    classes: int,
    fewshot_k: int = -1,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Probed:
    """Returns a classifier of `classes` classes and its metrics, in CLIP_benchmark's names and order.

    Large sets are learnt on all devices of the mesh, see `logistic.Problem`. `progress` is told how many fits are done,
    and of how many.

    Raises:
        UserError: there is nothing to learn or to test, labels or features are not what they must be, or there are too
            few examples for `split`.
    """
    for name, part in {"train": train, "validation": validation, "test": test}.items():
        if part is not None:
            _check(name, part, classes, train.features.shape[1])
    parts = split(train, validation, classes=classes, fewshot_k=fewshot_k, seed=seed)
    told = progress or (lambda done, total: None)
    weight_decay, swept = _searched(_Search(parts, classes, mesh, told))
    # From zeros and not from what the search has found: how many iterations it takes is one of the metrics.
    fitted = logistic.fit(*parts.final, classes, 1 / weight_decay, mesh=mesh)
    told(FITS + 1, FITS + 1)
    ranked = rank(fitted.linear, test.features)
    metrics = {
        **{f"lp_{name}": value for name, value in accuracies(ranked.best, test.labels).items()},
        "weight_decay": weight_decay,
        "epochs": fitted.iterations,
        "seed": seed,
        "fewshot_k": fewshot_k,
    }
    return Probed(metrics, fitted.linear, *ranked, swept)


def _searched(search: "_Search") -> tuple[float, list[tuple[float, float]]]:
    """Returns (the best λ, what was swept); what the search had on the devices is let go of."""
    search.run()
    swept = [(_lambda(place), judged.accuracy) for place, judged in sorted(search.swept.items())]
    return _lambda(search.peak), swept


def _check(name: str, part: Labelled, classes: int, width: int) -> None:
    """Raises UserError when a classifier of so many classes cannot be trained on, or tested by, the examples."""
    features, labels = part
    if not len(labels):
        raise UserError(f"{name} has no examples, and the linear probe needs some: give another split")
    if features.shape[1] != width:
        raise UserError(
            f"features of {name} have {features.shape[1]} dimensions and those of train {width}: "
            "take all of them from one model"
        )
    if not np.isfinite(features).all():
        raise UserError(
            f"{(~np.isfinite(features).all(axis=1)).sum():,} of {len(features):,} features of {name} are not finite: "
            "the model has diverged; take an earlier one"
        )
    if wrong := sorted({*labels[(labels < 0) | (labels >= classes)].tolist()}):
        raise UserError(
            f"{name} has labels {_some(wrong)}, and of {classes} classes they must be 0 to {classes - 1}: "
            "give the names of all classes, or another split"
        )
    if name == "train" and len(found := np.unique(labels)) == 1:
        raise UserError(f"train has class {found[0]} alone, and a classifier needs two: give another split")


def _some(words: list, most: int = 10) -> str:
    return ", ".join(map(str, words[:most])) + (f" and {len(words) - most:,} more" if len(words) > most else "")


def split(train: Labelled, validation: Labelled | None, *, classes: int, fewshot_k: int = -1, seed: int = 0) -> Split:
    """Returns what λ is looked for with, and what the classifier is trained on; -1: all of train.

    Without a validation set some examples of every class are held out, drawn by the seed: a fifth (of a class of two or
    more at least one); few-shot, up to four beside the shots. For one seed the shots of a smaller k are among those of
    a larger.

    Raises:
        UserError: a class has fewer examples than are to be drawn, or none has one to spare.
    """
    if fewshot_k != -1 and fewshot_k < 1:
        raise UserError(f"{fewshot_k=} must be examples a class, 1 or more, or -1 for all")
    random = np.random.default_rng(seed)
    drawn = [random.permutation(np.flatnonzero(train.labels == label)) for label in range(classes)]
    if fewshot_k != -1:
        return _few_shot(train, validation, drawn, fewshot_k)
    if validation is not None:
        return Split(train, validation, Labelled(*map(np.concatenate, zip(train, validation, strict=True))))
    held_out = [rows[: max(1, round(len(rows) * HELD_OUT))] if len(rows) > 1 else rows[:0] for rows in drawn]
    if not sum(map(len, held_out)):
        raise UserError("no class of train has two examples, so none can be held out: give a validation set")
    rest = [rows[len(out) :] for rows, out in zip(drawn, held_out, strict=True)]
    return Split(_taken(train, rest), _taken(train, held_out), train)


def _few_shot(train: Labelled, validation: Labelled | None, drawn: list[np.ndarray], k: int) -> Split:
    _check_enough(drawn, k, f"fewshot_k={k} takes {k} of every class", "take a smaller k, or classes that have as many")
    shots = _taken(train, [rows[:k] for rows in drawn])
    if validation is None:
        more = min(k, SHOTS_HELD_OUT)
        rule = f"fewshot_k={k} takes {k} of every class, and {more} more to look for λ with"
        _check_enough(drawn, k + more, rule, "give a validation set, or take a smaller k")
        validation = _taken(train, [rows[k : k + more] for rows in drawn])
    return Split(shots, validation, shots)


def _check_enough(drawn: list[np.ndarray], needed: int, rule: str, move: str) -> None:
    if few := [f"class {label} has {len(rows)}" for label, rows in enumerate(drawn) if len(rows) < needed]:
        raise UserError(f"{rule}; of train {_some(few)}: {move}")


def _taken(examples: Labelled, rows: list[np.ndarray]) -> Labelled:
    """Returns some of the examples, in the order that they have."""
    at = np.sort(np.concatenate(rows))
    return Labelled(examples.features[at], examples.labels[at])


def _lambda(place: int) -> float:
    return float(10 ** (place / STEPS_PER_DECADE))


class _Search:
    """Looks for the λ with which classifiers of train do best on validation."""

    def __init__(self, parts: Split, classes: int, mesh: Mesh | None, told: Progress):
        self._problem = logistic.Problem(*parts.train, classes, mesh=mesh)
        self._validation, self._told = parts.validation, told
        self.swept: dict[int, Judged] = {}  # by place
        self._done = 0

    @property
    def peak(self) -> int:
        """The best place; of equals that of the largest λ, whose weights are the smallest."""
        return max((judged, place) for place, judged in self.swept.items())[1]

    def run(self) -> None:
        """Visits places that are far apart, from the largest λ down, then neighbours of the best, nearer and nearer.

        Every fit starts where another has ended: one of the coarse where the last has, the others where the best has.
        """
        last = None
        for place in range(LARGEST, -LARGEST - 1, -COARSE):
            last = self._visit(place, last)
            if self.peak == place:
                best = last
        step = COARSE // 2
        while step:
            middle, start = self.peak, best
            for place in (middle + step, middle - step):
                found = self._visit(place, start)
                if self.peak == place:
                    best = found
            step //= 2

    def _visit(self, place: int, start: Linear | None) -> Linear | None:
        found = start
        if abs(place) <= LARGEST:
            found = self._problem.fit(1 / _lambda(place), start).linear
            self.swept[place] = judged(found, self._validation)
        self._done += 1  # beyond the ends there is nothing to fit
        self._told(self._done, FITS + 1)
        return found


class Judged(NamedTuple):
    """How good a classifier is: of two that are right equally often, the one that finds the labels likelier."""

    accuracy: float
    likelihood: float  # the mean logarithm of the labels' probabilities


def judged(linear: Linear, examples: Labelled) -> Judged:
    """Returns how good a classifier is on the examples."""
    right, likelihood = 0, 0.0
    for start in range(0, len(examples.labels), ROWS):
        labels_B1 = examples.labels[start : start + ROWS, None]
        scores_BK = logistic.scores(linear, examples.features[start : start + ROWS])
        right += int((scores_BK.argmax(axis=1) == labels_B1[:, 0]).sum())
        likelihood += float(
            (np.take_along_axis(scores_BK, labels_B1, axis=1)[:, 0] - logsumexp(scores_BK, axis=1)).sum()
        )
    return Judged(right / len(examples.labels), likelihood / len(examples.labels))


def rank(linear: Linear, features_BE: Float[np.ndarray, "B E"]) -> Ranked:
    """Returns what the classifier takes every example for; of equal scores the class that comes first."""
    best, confidence = [], []
    for start in range(0, len(features_BE), ROWS):
        scores_BK = logistic.scores(linear, features_BE[start : start + ROWS])
        best_BK = np.argsort(-scores_BK, axis=1, kind="stable")[:, :BEST]
        best.append(best_BK)
        over_BK = scores_BK - np.take_along_axis(scores_BK, best_BK[:, :1], axis=1)
        confidence.append(1 / np.exp(over_BK).sum(axis=1))
    return Ranked(np.concatenate(best), np.concatenate(confidence))
