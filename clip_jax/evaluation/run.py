"""One model, one task, one data set: a table on the screen, a JSON file, pictures beside it."""

import itertools
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table
import rich.text

from clip_jax.data.sources import Source
from clip_jax.errors import UserError, nearest
from clip_jax.evaluation import report, retrieval, zero_shot
from clip_jax.evaluation.encode import Encoder, encode_images, encode_texts
from clip_jax.evaluation.prompts import templates_for
from clip_jax.files import AnyPath, place, write_text

SHOWN_CAPTIONS = 6
SHOWN_MATCHES = 8

Picture = Callable[[AnyPath], None]  # draws itself into a file


class Result(NamedTuple):
    """What a task found out."""

    metrics: dict[str, float]
    pictures: dict[str, Picture]  # by the word that is added to the file's name


def zeroshot_classification(model: Encoder, source: Source, *, shows: bool = True) -> Result:
    """Returns how well the images are classified by their class names, with an ensemble of prompts."""
    names = source.classnames
    if not names:
        raise UserError(f"{source.name}:{source.split} has no classes; try --task=zeroshot_retrieval")
    templates = templates_for(source.name)
    images = encode_images(model, source, shows=shows)
    classes = zero_shot.classifier(model, names, templates)
    labels = np.array(images.labels)
    predictions = zero_shot.Predictions(images.img_BE @ classes.T, labels)
    metrics = zero_shot.metrics(predictions)
    title = f"{source.name}:{source.split}, zero-shot: {100 * metrics['acc1']:.1f} % right"
    prompts = [templates[0].format(name) for name in names]
    matches = _matches(source, prompts, predictions.scores.T, lambda i, c: labels[i] == c)
    predicted = predictions.scores.argmax(axis=1)
    return Result(
        metrics,
        {
            "confusion": lambda path: report.confusion_matrix(path, labels, predicted, names, title),
            "matches": lambda path: report.best_matches(path, matches, f"nearest images, {source.name}:{source.split}"),
        },
    )


def zeroshot_retrieval(model: Encoder, source: Source, *, shows: bool = True) -> Result:
    """Returns how often texts find their image, and images one of their texts."""
    images = encode_images(model, source, shows=shows)
    texts = list(itertools.chain.from_iterable(images.captions))
    image_of_text = np.repeat(np.arange(len(source)), [len(captions) for captions in images.captions])
    embeddings = encode_texts(model, texts)
    metrics = retrieval.metrics(retrieval.ranks(embeddings, images.img_BE, image_of_text))
    shown = np.linspace(0, len(texts) - 1, SHOWN_CAPTIONS).astype(int)
    captions, scores = [texts[t] for t in shown], embeddings[shown] @ images.img_BE.T
    matches = _matches(source, captions, scores, lambda i, c: image_of_text[shown[c]] == i)
    title = f"nearest images, {source.name}:{source.split}"
    return Result(metrics, {"matches": lambda path: report.best_matches(path, matches, title)})


TASKS = {"zeroshot_classification": zeroshot_classification, "zeroshot_retrieval": zeroshot_retrieval}
METRICS = {"zeroshot_classification": zero_shot.METRICS, "zeroshot_retrieval": retrieval.METRICS}  # that are found
NEEDS = {"zeroshot_classification": ("image", "label"), "zeroshot_retrieval": ("image", "captions")}  # of a record


def evaluate(model: Encoder, source: Source, task: str, *, output: str | os.PathLike) -> dict:
    """Runs a task, prints its table, writes its files, and returns the result in CLIP_benchmark's schema.

    Raises:
        UserError: an unknown task, a data set that has not what the task needs, or a file that cannot be written.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}{nearest(task, TASKS)}")
    found = TASKS[task](model, source)
    path, result = place(output), in_schema(model, source, task, found.metrics)
    write_result(path, result)
    pictures = []
    for word, draw in found.pictures.items():
        pictures.append(path.with_name(f"{path.stem}_{word}.png"))
        draw(pictures[-1])
    _print(result, source, [path, *pictures])
    return result


def in_schema(model: Encoder, source: Source, task: str, metrics: dict[str, float]) -> dict:
    """Returns a result as CLIP_benchmark writes it."""
    return {
        "dataset": source.name,
        "model": model.name,
        "pretrained": model.pretrained,
        "task": task,
        "metrics": metrics,
        "language": "en",
    }


def write_result(path: AnyPath, result: dict) -> None:
    """Writes a result's JSON file."""
    write_text(path, json.dumps(result, indent=2) + "\n")


def _matches(source: Source, captions: list[str], scores: np.ndarray, right: Callable[[int, int], bool]):
    """Returns the best images for each caption; `scores` is [captions, images]."""
    rows = []
    for c, caption in enumerate(captions):
        best = np.argsort(-scores[c], kind="stable")[:SHOWN_MATCHES].tolist()
        rows.append(report.Matches(caption, [source[i].image for i in best], [bool(right(i, c)) for i in best]))
    return rows


def _print(result: dict, source: Source, files: list[AnyPath]) -> None:
    title = f"{result['task']} · {source.name}:{source.split} · {len(source):,} images"
    table = rich.table.Table(title=rich.text.Text(title), min_width=len(title) + 2)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result["metrics"].items():
        table.add_row(name, f"{100 * value:.2f} %")
    console = rich.console.Console()
    console.print(table)
    for file in files:
        console.print(str(file), soft_wrap=True, highlight=False, markup=False, emoji=False)
