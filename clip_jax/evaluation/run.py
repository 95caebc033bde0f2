"""Evaluations of one model or two: files in CLIP_benchmark's schema, pictures beside them, and one table."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import rich.console
import rich.table
import rich.text

from clip_jax import distributed
from clip_jax.data.sources import Source
from clip_jax.errors import UserError
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.progress import say
from clip_jax.evaluation.tasks import Options, Result, digest, task_of
from clip_jax.files import AnyPath, read_json, write_text

SHARES = ("acc", "recall")  # in the names of metrics that are shown in per cent


class Evaluation(NamedTuple):
    """A task on a data set."""

    task: str
    source: Source
    options: Options
    main: tuple[str, ...] = ()  # metrics of which the mean counts in an average; (): the task's own

    @property
    def name(self) -> str:
        """Returns what its result is called, in files and among the metrics of a run."""
        shots = f"_{self.options.fewshot_k}shot" if self.task == "linear_probe" and self.options.fewshot_k > 0 else ""
        return f"{self.source.name}_{self.source.split}_{self.task}{shots}".replace("/", "_")

    @property
    def counts(self) -> tuple[str, ...]:
        """Returns the metrics of which the mean counts in an average."""
        return self.main or task_of(self.task).main

    def score(self, metrics: dict[str, float]) -> float:
        """Returns what stands for it in an average."""
        return sum(metrics[name] for name in self.counts) / len(self.counts)


class Done(NamedTuple):
    """An evaluation of a model, in its file."""

    evaluation: Evaluation
    written: dict  # what the file says
    files: list[str]  # that one first, then pictures
    result: Result | None  # None: it was done before


def evaluate(model: OnMesh, evaluation: Evaluation, file: AnyPath, *, draws: bool = True, shows: bool = True) -> Done:
    """Does one evaluation and writes its files, the result last: where that is, all are. All processes do it alike, and
    the first one writes. `draws` says whether there are pictures, `shows` whether it tells how far it is.

    Raises:
        UserError: a data set that has not what the task needs, a model that has diverged, or a file that cannot be
            written.
    """
    result = task_of(evaluation.task).run(model, evaluation.source, evaluation.options, shows=shows)
    written = in_schema(model, evaluation, result)

    def write() -> list[str]:
        drawn = _draw(evaluation, result, file) if draws else []
        if model.fingerprint is not None:
            write_text(_asked_file(file), json.dumps(_asked(model, evaluation), indent=2) + "\n")
        write_text(file, json.dumps(written, indent=2) + "\n")
        return [str(file), *drawn]

    return Done(evaluation, written, distributed.of_first(write), result)


def _draw(evaluation: Evaluation, result: Result, file: AnyPath) -> list[str]:
    """Returns the files of the pictures that it draws."""
    from clip_jax.evaluation import pictures  # not above: Matplotlib is half a second of a run's start

    drawn = []
    for word, draw in pictures.of(evaluation.source, evaluation.task, result).items():
        picture = file.with_name(f"{file.stem}_{word}.png")
        draw(picture)
        drawn.append(str(picture))
    return drawn


def _asked_file(file: AnyPath) -> AnyPath:
    """Returns the file beside a result that says what was asked, and the result's schema has no place for."""
    return file.with_name(f".{file.stem}.asked")


def _asked(model: OnMesh, evaluation: Evaluation) -> dict[str, Any]:
    """Returns what the result depends on: plain JSON values."""
    data = digest(evaluation.source.fingerprint())
    return {"weights": model.fingerprint, "data": data} | task_of(evaluation.task).asked(
        evaluation.source, evaluation.options
    )


def in_schema(model: OnMesh, evaluation: Evaluation, result: Result) -> dict:
    """Returns a result as CLIP_benchmark writes it; and how many were evaluated, where some were not."""
    options = evaluation.options
    written = {
        "dataset": evaluation.source.name,
        "model": model.name,
        "pretrained": model.pretrained,
        "task": evaluation.task,
        "metrics": result.metrics,
        "language": "en",
    }
    if options.dump_classnames and result.classnames:
        written["classnames"] = list(result.classnames)
    if options.dump_templates and result.templates:
        written["templates"] = result.templates
    if result.left_out:
        written |= {"evaluated": result.evaluated, "left_out": result.left_out}
    return written


def evaluate_all(
    model: OnMesh, evaluations: Sequence[Evaluation], file_of: Callable[[Evaluation], AnyPath], *, resume: bool = False
) -> tuple[list[Done], list[str]]:
    """Returns all evaluations of a model, done or, where `resume` says so, found; and what went wrong: that keeps no
    other from being done."""
    done, problems = [], []
    for evaluation in evaluations:
        file = file_of(evaluation)
        try:
            before = functools.partial(_done_before, model, evaluation, file)
            written = distributed.of_first(before) if resume else None
            if written is not None:
                say(f"{file} is done")
                done.append(Done(evaluation, written, [str(file)], None))
                continue
            done.append(evaluate(model, evaluation, file))
        except UserError as error:
            problems.append(f"{evaluation.name}: {error}")
            if len(evaluations) > 1:
                say(f"error: {problems[-1]}")
            continue
        for words, count in done[-1].written.get("left_out", {}).items():
            say(f"{evaluation.name}: left out: {words} {count:,}")
    return done, problems


def _done_before(model: OnMesh, evaluation: Evaluation, file: AnyPath) -> dict | None:
    """Returns what a file says of the same evaluation of the same model; None: it is to be done.

    Raises:
        UserError: the file is of something else.
    """
    if not file.exists():
        return None
    found = read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict):
        raise UserError(f"{file} is no result of an evaluation: choose another --output, or delete it")
    asked = {"dataset": evaluation.source.name, "task": evaluation.task}
    asked |= {"model": model.name, "pretrained": model.pretrained}
    said = found
    if _asked_file(file).exists():
        asked |= _asked(model, evaluation)
        beside = read_json(_asked_file(file))
        said = found | (beside if isinstance(beside, dict) else {})
    differs = [
        f"{key} was {said.get(key)!r} and is {value!r}" for key, value in asked.items() if said.get(key) != value
    ]
    if differs:
        raise UserError(f"{file} is of another evaluation: {'; '.join(differs)}: choose another --output, or delete it")
    return found


def show(done: Sequence[Done], averages: Sequence[float] = ()) -> None:
    """Prints one table, with the average of each model where there are any, and where the files are."""
    if jax.process_index() != 0:
        return
    console = rich.console.Console()
    models = list(dict.fromkeys(one.written["pretrained"] for one in done))
    letters = ["value"] if len(models) == 1 else [chr(ord("A") + i) for i in range(len(models))]
    for letter, model in zip(letters, models if len(models) > 1 else (), strict=False):
        console.print(f"{letter}: {model}", soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(_table(done, letters, averages))
    for one in done:
        for file in one.files if len(done) == 1 else one.files[:1]:
            console.print(file, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _table(done: Sequence[Done], letters: Sequence[str], averages: Sequence[float]) -> rich.table.Table:
    """Returns a row for every metric of every evaluation, with a value for each model."""
    table = rich.table.Table()
    for column in ("data set and task", "metric"):
        table.add_column(column, overflow="fold")
    for letter in letters:
        table.add_column(letter, justify="right")
    by_name: dict[str, list[Done]] = {}
    for one in done:
        by_name.setdefault(one.evaluation.name, []).append(one)
    for several in by_name.values():
        source, first = several[0].evaluation.source, several[0].written
        images = first.get("evaluated", len(source))
        words = [f"{source.name}:{source.split}", first["task"], f"{images:,} images"]
        for row, name in enumerate(first["metrics"]):
            values = [in_words(name, one.written["metrics"][name]) for one in several]
            table.add_row(*map(rich.text.Text, (words[row] if row < len(words) else "", name, *values)))
        table.add_section()
    if averages:
        table.add_row("average", "", *(in_words("acc", average) for average in averages))
    return table


def in_words(name: str, value: float | int) -> str:
    """Returns a metric's value for people: shares in per cent."""
    if not any(word in name for word in SHARES):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return f"{100 * value:.2f} %" if math.isfinite(value) else "not defined"
