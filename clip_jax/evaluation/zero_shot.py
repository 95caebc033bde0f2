"""Zero-shot classification: the class whose caption is nearest (CLIP, section 3.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from clip_jax.evaluation.encode import TextEncoder, encode_texts
from clip_jax.models.clip import l2_normalise
from clip_jax.typing import Float, Int

METRICS = ("acc1", "acc5", "mean_per_class_recall")


class Predictions(NamedTuple):
    """Cosine similarities of every image with every class, and the truth."""

    scores: Float[np.ndarray, "B classes"]
    labels: Int[np.ndarray, " B"]


def classifier(
    model: TextEncoder, classnames: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "classes E"]:
    """Returns one embedding a class: every template encoded, normalised, averaged, normalised."""
    prompts = [template.format(name) for name in classnames for template in templates]
    mean_CE = encode_texts(model, prompts).reshape(len(classnames), len(templates), -1).mean(axis=1)
    return np.asarray(l2_normalise(jnp.asarray(mean_CE)))


def metrics(predictions: Predictions) -> dict[str, float]:
    """Returns acc1, acc5 and mean_per_class_recall, as CLIP_benchmark defines them; acc5 is NaN under five classes."""
    scores, labels = predictions
    found = scores.argmax(axis=1) == labels
    five_best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    recalls = [found[labels == label].mean() for label in np.unique(labels)]
    return {
        "acc1": float(found.mean()),
        "acc5": float((five_best == labels[:, None]).any(axis=1).mean()) if scores.shape[1] >= 5 else float("nan"),
        "mean_per_class_recall": float(np.mean(recalls)),
    }
