"""What is behind a classification's numbers: every class by itself, how sure the model is, and where it is wrong."""

from typing import NamedTuple

import numpy as np

from clip_jax.evaluation.zero_shot import Predictions
from clip_jax.typing import Bool, Float, Int

BINS = 15  # of confidence, as in Guo et al., arXiv 1706.04599


class PerClass(NamedTuple):
    """What became of the images of every class."""

    images: Int[np.ndarray, " C"]
    right: Int[np.ndarray, " C"]  # of them
    taken_for: Int[np.ndarray, " C"]  # what most of the others were taken for, of equals the first; -1: none was wrong
    times: Int[np.ndarray, " C"]  # how many that are

    @property
    def share(self) -> Float[np.ndarray, " C"]:
        """Returns the share that is right; NaN where a class has no image."""
        return np.where(self.images > 0, self.right / np.maximum(self.images, 1), np.nan)


def per_class(found: Predictions) -> PerClass:
    """Returns how many images each class has, how many are right, and what it is taken for most often."""
    labels, best, classes = found.labels.astype(np.int64), found.best[:, 0].astype(np.int64), found.classes
    wrong = labels != best
    images, right = (np.bincount(some, minlength=classes) for some in (labels, labels[~wrong]))
    pairs, counts = np.unique(labels[wrong] * classes + best[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    of, first = np.unique(pairs[order] // classes, return_index=True)
    taken_for, times = np.full(classes, -1), np.zeros(classes, np.int64)
    taken_for[of], times[of] = pairs[order][first] % classes, counts[order][first]
    return PerClass(images, right, taken_for, times)


class Calibration(NamedTuple):
    """How sure a model is, and how often it is right then, by bins of equal width; NaN where a bin has no image."""

    images: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]  # mean of those in a bin
    right: Float[np.ndarray, " bins"]  # share of them
    error: float  # expected calibration error: how far the two are apart, for the mean image


def calibration(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = BINS) -> Calibration:
    """Returns the reliability of probabilities (Guo et al., arXiv 1706.04599); a bin has its upper end."""
    ends = np.arange(1, bins) / bins
    bin_of = np.searchsorted(ends, confidence, "left")
    images = np.bincount(bin_of, minlength=bins)
    sums = (np.bincount(bin_of, weights, bins) for weights in (confidence.astype(np.float64), right.astype(np.float64)))
    sure, share = (np.where(images > 0, x / np.maximum(images, 1), np.nan) for x in sums)
    error = float(np.nansum(images * np.abs(share - sure)) / len(confidence))
    return Calibration(images, sure, share, error)


def mistakes(found: Predictions, most: int) -> Int[np.ndarray, " n"]:
    """Returns the rows that are wrong, the surest first; of equals the first."""
    wrong = np.flatnonzero(found.best[:, 0] != found.labels)
    return wrong[np.argsort(-found.confidence[wrong], kind="stable")][:most]
