"""Zero-shot classification: the class whose captions are nearest (CLIP, section 3.1)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import distributed
from clip_jax.data.sources import Source
from clip_jax.errors import UserError
from clip_jax.evaluation.encode import Images, Part, encode_texts, finite
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.progress import progress, say
from clip_jax.files import whole
from clip_jax.models.clip import l2_normalise
from clip_jax.typing import Float, Int

METRICS = ("acc1", "acc5", "mean_per_class_recall")
BEST = 5  # classes that are kept of an image: an evaluation of any length takes no more memory than this
VERSION = 1  # of how a classifier is made: those that are kept from others are not taken
SHOWN, MATCHES = 10, 8  # classes whose nearest images are kept, and how many of each
PROMPTS = 1 << 13  # that are encoded and held at once


class Predictions(NamedTuple):
    """What images were taken for, and what they are."""

    best: Int[np.ndarray, "n k"]  # the classes nearest to each, best first; at most BEST
    labels: Int[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]  # the probability that the model gives the best class
    index: Int[np.ndarray, " n"]  # of the image in its source
    classes: int


class Nearest(NamedTuple):
    """The images nearest to some classes, best first."""

    classes: Int[np.ndarray, " S"]
    score: Float[np.ndarray, "S n"]
    index: Int[np.ndarray, "S n"]  # in the source; -1: there are not so many
    label: Int[np.ndarray, "S n"]


def classifier(
    model: OnMesh, prompts: Sequence[Sequence[str]], *, shows: bool = False
) -> Float[np.ndarray, "classes E"]:
    """Returns one embedding a class: each of its prompts encoded, normalised; the mean of them, normalised."""
    means = []
    with progress("prompts", sum(map(len, prompts)), "prompts", shows=shows) as advance:
        for some in _in_parts(prompts):
            texts = [text for one in some for text in one]
            embeddings = encode_texts(model, texts)
            counts = np.array([len(one) for one in some])
            sums = np.add.reduceat(embeddings, np.cumsum(counts) - counts, axis=0)
            means.append(sums / counts[:, None])
            advance(len(texts))
    return np.asarray(l2_normalise(np.concatenate(means).astype(np.float32)))


def cached_classifier(
    model: OnMesh, prompts: Sequence[Sequence[str]], folder: Path | None, *, shows: bool = False
) -> Float[np.ndarray, "classes E"]:
    """Returns the classifier that a folder has of the model and the prompts, or makes it and puts it there; None: no
    folder. Processes take it from there if all of them find the same.
    """
    if folder is None or model.fingerprint is None:
        return classifier(model, prompts, shows=shows)
    asked = hashlib.sha256(json.dumps([VERSION, model.fingerprint, prompts]).encode()).hexdigest()
    file = folder / f"{asked}.npy"
    known = _read(file, (len(prompts), model.architecture.embed_dim))
    found = distributed.gather(None if known is None else hashlib.sha256(known.tobytes()).hexdigest())
    if known is not None and len(set(found)) == 1:
        return known
    class_CE = classifier(model, prompts, shows=shows)
    if jax.process_index() == 0:
        try:
            with whole(file) as temporary:
                np.save(temporary, class_CE)
        except UserError as error:  # a home that cannot be written to is no reason not to evaluate
            say(f"the classifier is not kept: {error}; CLIP_JAX_CACHE names another folder")
    return class_CE


def _read(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Returns the array of a file; None: there is none, or another, or it is damaged."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 and np.isfinite(found).all() else None


def _in_parts(prompts: Sequence[Sequence[str]]) -> list[list[Sequence[str]]]:
    """Returns the classes' prompts, a few classes at once; a class stays together."""
    parts, held = [[]], 0
    for one in prompts:
        if held and held + len(one) > PROMPTS:
            parts.append([])
            held = 0
        parts[-1].append(one)
        held += len(one)
    return parts


def classify(images: Images, class_CE: Float[np.ndarray, "classes E"]) -> tuple[Predictions, Nearest]:
    """Returns what every image is taken for, and the images that are nearest to some of the classes.

    Raises:
        UserError: a record without a label, a label that is no class, or embeddings that are not finite.
    """
    model, source, classes = images.model, images.source, len(class_CE)
    kept = Predictions(*(np.empty((len(source), *shape), dtype) for shape, dtype in _shapes(classes)), classes)
    chosen = np.unique(np.linspace(0, classes - 1, min(SHOWN, classes)).astype(int))
    nearest = Nearest(chosen, *(np.full((len(chosen), MATCHES), fill) for fill in (-np.inf, -1, -1)))
    class_CE, scale, done = model.everywhere(class_CE), model.scale(), 0
    for part in images:
        labels = labels_of(part, source, classes)
        scores_BC, best, confidence = _scored(part.features, class_CE, scale)
        here = slice(done, done + len(labels))
        kept.best[here] = model.gathered(best)[part.rows]
        kept.confidence[here] = finite(model.gathered(confidence)[part.rows], model)
        kept.labels[here], kept.index[here] = labels, part.index
        done += len(labels)
        nearest = _nearer(nearest, model.gathered(_some(scores_BC, chosen))[part.rows], part.index, labels)
    return Predictions(*(x[:done] for x in kept[:4]), classes), nearest


def _shapes(classes: int) -> list[tuple[tuple[int, ...], type]]:
    """Returns shapes, without the first dimension, and dtypes of `Predictions`."""
    return [((min(BEST, classes),), np.int32), ((), np.int32), ((), np.float32), ((), np.int64)]


@jax.jit
def _scored(img_BE: jax.Array, class_CE: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns cosines, the best classes, of equals the first, and the best one's probability."""
    scores_BC = jnp.matmul(img_BE, class_CE.T, precision=jax.lax.Precision.HIGHEST)
    _, best = jax.lax.top_k(scores_BC, min(BEST, len(class_CE)))
    confidence = jnp.max(jax.nn.softmax(scale * scores_BC, axis=1), axis=1)
    return scores_BC, best, confidence


@jax.jit
def _some(scores_BC: jax.Array, classes: jax.Array) -> jax.Array:
    return scores_BC[:, classes]


def _nearer(
    known: Nearest, scores_nS: Float[np.ndarray, "n S"], index: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> Nearest:
    """Returns the nearest of those known and some more, which come later."""
    shape = len(known.classes), len(index)
    score = np.concatenate([known.score, scores_nS.T], axis=1)
    order = np.argsort(-score, axis=1, kind="stable")[:, : known.score.shape[1]]
    more = (np.broadcast_to(index, shape), np.broadcast_to(labels, shape))
    found = [np.concatenate(pair, axis=1) for pair in zip((known.index, known.label), more, strict=True)]
    return Nearest(known.classes, *(np.take_along_axis(x, order, axis=1) for x in (score, *found)))


def labels_of(part: Part, source: Source, classes: int | None) -> Int[np.ndarray, " n"]:
    """Returns the labels of a part's records, which are below `classes` where that is known.

    Raises:
        UserError: one has none, or one that is no class.
    """
    labels = [record.label for record in part.records]
    for label, index in zip(labels, part.index, strict=True):
        if label is None:
            raise UserError(f"record {index} of {source.name}:{source.split} has no label")
        if label < 0 or (classes is not None and label >= classes):
            known = "" if classes is None else f", and there are {classes} class names, 0 to {classes - 1}"
            raise UserError(
                f"record {index} of {source.name}:{source.split} has the label {label}{known}: give the names that go "
                "with these labels"
            )
    return np.array(labels, np.int32)


def metrics(found: Predictions) -> dict[str, float]:
    """Returns acc1, acc5 and mean_per_class_recall."""
    return accuracies(found.best, found.labels)


def accuracies(best: Int[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Returns the metrics of classes, best first, as CLIP_benchmark defines them; acc5 is NaN under five classes."""
    is_right = best == labels[:, None]
    first = is_right[:, 0]
    recalls = [first[labels == label].mean() for label in np.unique(labels)]
    return {
        "acc1": float(first.mean()),
        "acc5": float(is_right.any(axis=1).mean()) if best.shape[1] == BEST else float("nan"),
        "mean_per_class_recall": float(np.mean(recalls)),
    }
