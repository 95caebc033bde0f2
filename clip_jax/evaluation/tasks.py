"""What a model can be measured by: a task on a data set, its metrics, and what is behind them."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_jax.data.sources import Source
from clip_jax.errors import UserError, nearest
from clip_jax.evaluation import linear_probe as probe
from clip_jax.evaluation import prompts, retrieval, zero_shot
from clip_jax.evaluation.encode import Images, encode_texts, finite
from clip_jax.evaluation.linear_probe import Labelled
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.progress import progress, say
from clip_jax.evaluation.zero_shot import Predictions
from clip_jax.typing import Int

SHOWN_CAPTIONS = 6  # whose nearest images are kept


@dataclasses.dataclass(frozen=True)
class Options:
    """How tasks are done where there is a choice."""

    classnames: str | None = None  # of JSON files: evaluation/prompts.py
    templates: str | None = None
    cache: Path | None = None  # folder of zero-shot classifiers; None: none are kept
    recalls: tuple[int, ...] = retrieval.RECALLS_AT
    train: Source | None = None  # what a linear probe learns from
    validation: Source | None = None  # by which its regularisation is chosen; None: a part of `train`
    fewshot_k: int = -1  # examples a class; -1: all
    seed: int = 0  # of what is drawn of `train`
    feature: str = "pooled"  # of on_mesh.FEATURES; "embedding" is what CLIP_benchmark takes
    dump_classnames: bool = False  # into the result
    dump_templates: bool = False

    def __post_init__(self):
        if self.fewshot_k != -1 and self.fewshot_k < 1:
            raise UserError(f"fewshot_k={self.fewshot_k} should be examples a class, 1 or more, or -1 for all")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} should be at least 0")


DEFAULTS = Options()


class Matches(NamedTuple):
    """A caption, or a class's first prompt, and the images nearest to it, best first, by their index in the source."""

    caption: str
    images: list[int]
    right: list[bool]


class Retrieved(NamedTuple):
    """What a retrieval found."""

    ranks: retrieval.Ranks
    texts: list[str]
    image_of_text: Int[np.ndarray, " A"]  # which of the images
    index: Int[np.ndarray, " B"]  # of the images in the source


class Result(NamedTuple):
    """What a task found out."""

    metrics: dict[str, float]
    evaluated: int  # images
    left_out: Mapping[str, int]  # records that could not be, by reason
    found: Predictions | Retrieved
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] | Mapping[str, list[str]] = ()
    matches: tuple[Matches, ...] = ()


def zeroshot_classification(
    model: OnMesh, source: Source, options: Options = DEFAULTS, *, shows: bool = True
) -> Result:
    """Returns how well the images are classified by their class names, with an ensemble of prompts."""
    asked = prompts.of(source, options.classnames, options.templates)
    for note in asked.notes:
        say(note)
    class_CE = zero_shot.cached_classifier(model, asked.sentences, options.cache, shows=shows)
    images = Images(model, source, shows=shows)
    found, shown = zero_shot.classify(images, class_CE)
    matches = [
        Matches(asked.sentences[c][0], index[index >= 0].tolist(), (label == c)[index >= 0].tolist())
        for c, index, label in zip(shown.classes, shown.index, shown.label, strict=True)
    ]
    known = {"classnames": asked.classnames, "templates": asked.templates, "matches": tuple(matches)}
    return Result(zero_shot.metrics(found), len(found.labels), left_out(images), found, **known)


def zeroshot_retrieval(model: OnMesh, source: Source, options: Options = DEFAULTS, *, shows: bool = True) -> Result:
    """Returns how often texts find their image, and images one of their texts."""
    images = Images(model, source, shows=shows)
    parts = [(model.gathered(part.features)[part.rows], part.index, part.records) for part in images]
    img_BE = finite(np.concatenate([features for features, *_ in parts]), model)
    index = np.concatenate([index for _, index, _ in parts])
    captions = [record.captions for *_, records in parts for record in records]
    texts = [text for several in captions for text in several]
    image_of_text = np.repeat(np.arange(len(captions)), [len(several) for several in captions])
    txt_AE = encode_texts(model, texts, shows=shows)
    ranks = retrieval.ranks(txt_AE, img_BE, image_of_text, model.mesh)
    matches = []
    for t in np.unique(np.linspace(0, len(texts) - 1, SHOWN_CAPTIONS).astype(int)):
        best = np.argsort(-(img_BE @ txt_AE[t]), kind="stable")[: zero_shot.MATCHES]
        matches.append(Matches(texts[t], index[best].tolist(), (best == image_of_text[t]).tolist()))
    found = Retrieved(ranks, texts, image_of_text, index)
    metrics = retrieval.metrics(ranks, options.recalls)
    return Result(metrics, len(index), left_out(images), found, matches=tuple(matches))


def linear_probe(model: OnMesh, source: Source, options: Options = DEFAULTS, *, shows: bool = True) -> Result:
    """Returns how well a linear classifier of the image features does that was trained on `options.train`.

    Raises:
        UserError: there is nothing to train on, or it has not the same classes.
    """
    if options.train is None:
        raise UserError("a linear probe needs examples to learn from: name them with --train=SPEC")
    sources = [options.train, options.validation, source]
    classnames = _same_classes([one for one in sources if one is not None])
    passes = [one and Images(model, one, feature=options.feature, shows=shows) for one in sources]
    train, validation, test = (one and labelled(one, len(classnames) or None) for one in passes)
    known = [one.examples.labels.max() for one in (train, validation, test) if one is not None]
    classes = len(classnames) or int(max(known)) + 1
    with progress("λ", probe.FITS + 1, "fits", shows=shows) as advance:
        probed = probe.probe(
            *(one and one.examples for one in (train, validation, test)),
            classes=classes,
            fewshot_k=options.fewshot_k,
            seed=options.seed,
            mesh=model.mesh,
            progress=lambda done, total: advance(1),
        )
    found = Predictions(probed.best, test.examples.labels, probed.confidence, test.index, classes)
    metrics = probed.metrics | {"normalized": options.feature == "embedding"}
    missing = left_out(passes[-1])
    for name, one in zip(("train", "validation"), passes, strict=False):
        missing |= {f"{words} (of {name})": n for words, n in (left_out(one) if one else {}).items()}
    names = classnames or tuple(map(str, range(classes)))
    return Result(metrics, len(found.labels), missing, found, names)


class Embedded(NamedTuple):
    """The features of a data set with labels."""

    examples: Labelled
    index: Int[np.ndarray, " n"]  # in the source


def labelled(images: Images, classes: int | None) -> Embedded:
    """Returns all features and labels, which are below `classes` where that is known."""
    model, source = images.model, images.source
    features, labels, index = None, np.empty(len(source), np.int32), np.empty(len(source), np.int64)
    done = 0
    for part in images:
        here = model.gathered(part.features)[part.rows]
        features = np.empty((len(source), here.shape[1]), np.float32) if features is None else features
        rows = slice(done, done + len(here))
        features[rows], index[rows] = here, part.index
        labels[rows] = zero_shot.labels_of(part, source, classes)
        done += len(here)
    return Embedded(Labelled(finite(features[:done], model), labels[:done]), index[:done])


def _same_classes(sources: list[Source]) -> tuple[str, ...]:
    """Returns the names of the classes that data sets have in common; none, where none says.

    Raises:
        UserError: a label would mean one thing here and another there.
    """
    named = [source for source in sources if source.classnames]
    for source in named[1:]:
        if source.classnames != named[0].classnames:
            pairs = itertools.zip_longest(named[0].classnames, source.classnames)
            at, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            first, other = (f"{one.name}:{one.split}" for one in (named[0], source))
            raise UserError(
                f"class {at} is {ours!r} in {first} and {theirs!r} in {other}: what a probe learns from must have the "
                "classes that it is tested on, in the same order"
            )
    return named[0].classnames if named else ()


def left_out(images: Images) -> dict[str, int]:
    """Returns what of a data set was not evaluated, by reason; what its index has left out, and broken shards, too."""
    inventory = images.source.inventory()
    found = collections.Counter(inventory.left_out) + images.left_out
    return dict(found.most_common()) | {f"{name} {words}": 1 for name, words in inventory.broken.items()}


def digest(facts: Any) -> str:
    """Returns what tells plain JSON values from others."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _of_prompts(source: Source, options: Options) -> dict[str, Any]:
    return {"prompts": digest(prompts.of(source, options.classnames, options.templates).sentences)}


def _of_recalls(source: Source, options: Options) -> dict[str, Any]:
    return {"recall_k": list(options.recalls)}


def _of_learning(source: Source, options: Options) -> dict[str, Any]:
    learnt_from = {"train": options.train, "validation": options.validation}
    facts = {name: one and digest(one.fingerprint()) for name, one in learnt_from.items()}
    return facts | {"fewshot_k": options.fewshot_k, "seed": options.seed, "feature": options.feature}


class Task(NamedTuple):
    """What a task needs of a record, and what it finds."""

    run: Callable[..., Result]
    needs: tuple[str, ...]
    metrics: Callable[[Options], tuple[str, ...]]  # by their names in results
    main: tuple[str, ...]  # of which the mean stands for the task in an average
    asked: Callable[[Source, Options], dict[str, Any]]  # what its result depends on beside the model and the data


TASKS = {
    "zeroshot_classification": Task(
        zeroshot_classification, ("image", "label"), lambda _: zero_shot.METRICS, ("acc1",), _of_prompts
    ),
    "zeroshot_retrieval": Task(
        zeroshot_retrieval,
        ("image", "captions"),
        lambda options: retrieval.names(options.recalls),
        ("image_retrieval_recall@1", "text_retrieval_recall@1"),
        _of_recalls,
    ),
    "linear_probe": Task(linear_probe, ("image", "label"), lambda _: probe.METRICS, ("lp_acc1",), _of_learning),
}


def task_of(name: str) -> Task:
    """Returns the task of a name.

    Raises:
        UserError: there is none.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{nearest(name, TASKS)}")
    return TASKS[name]
