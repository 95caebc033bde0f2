"""What is to be evaluated: data sets by their specs, or a suite in a file, so that an average means the same to all.

A suite is JSON; what an evaluation leaves out is as for a data set that is given alone:

    {"name": "mine",
     "evaluations": [
       {"dataset": "wds:{root}/wds_cifar10", "task": "zeroshot_classification"},
       {"dataset": "wds:{root}/wds_flickr30k", "task": "zeroshot_retrieval", "main": ["image_retrieval_recall@5"]},
       {"dataset": "tfds:cifar10", "task": "linear_probe", "train": "tfds:cifar10:train"}]}

The average is that of the evaluations' main metrics; of several, an evaluation counts with their mean.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from clip_jax.data.sources import Source, open_source
from clip_jax.errors import UserError, about, all_of, nearest
from clip_jax.evaluation.run import Done, Evaluation
from clip_jax.evaluation.tasks import Options, task_of
from clip_jax.files import AnyPath, read_json, write_text

OWN = {"classnames": str, "templates": str, "fewshot_k": int}  # fields that are those of `Options`
FIELDS = {"dataset": str, "task": str, "main": list, "train": str, "validation": str} | OWN


class Wanted(NamedTuple):
    """One evaluation by its words; "auto" is the task that the data set is made for."""

    dataset: str
    task: str = "auto"
    main: tuple[str, ...] = ()
    train: str | None = None
    validation: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})  # fields of `Options`, where they are not everybody's


class Suite(NamedTuple):
    """Several evaluations with a name."""

    name: str
    wanted: list[Wanted]


def read(path: str) -> Suite:
    """Returns the suite of a file.

    Raises:
        UserError: it cannot be read, or is none; all that is wrong.
    """
    content = read_json(Path(os.path.expanduser(path)))  # noqa: PTH111 (Path's own fails for a user that there is not)
    with about(path):
        if not isinstance(content, dict) or not isinstance(content.get("evaluations"), list):
            raise UserError('should be {"name": …, "evaluations": [{"dataset": …, "task": …}, …]}')
        if unknown := sorted(content.keys() - {"name", "evaluations"}):
            raise UserError(f"no such field: {unknown[0]!r}; a suite has name and evaluations")
        if not content["evaluations"]:
            raise UserError("evaluations is empty")
        wanted = all_of(*((lambda i=i, one=one: _wanted(i, one)) for i, one in enumerate(content["evaluations"])))
    return Suite(str(content.get("name", Path(path).stem)).replace("/", "_"), wanted)


def _wanted(i: int, one: Any) -> Wanted:
    with about(f"evaluation {i}"):
        if not isinstance(one, dict) or "dataset" not in one:
            raise UserError('should be {"dataset": SPEC, "task": …}')
        for field, value in one.items():
            if field not in FIELDS:
                raise UserError(f"no such field: {field!r}{nearest(field, FIELDS)}")
            if not isinstance(value, FIELDS[field]) or isinstance(value, bool):
                raise UserError(f"{field}={value!r} should be {FIELDS[field].__name__}")
        if not all(isinstance(name, str) for name in one.get("main", ())):
            raise UserError(f"main={one['main']!r} should be names of metrics")
        own = {field: one[field] for field in OWN if field in one}
        rest = {field: value for field, value in one.items() if field not in own}
        return Wanted(**rest | {"main": tuple(rest.get("main", ()))}, options=own)


def open_all(
    wanted: Sequence[Wanted], options: Options, *, root: str | None = None, data_dir: str | None = None
) -> list[Evaluation]:
    """Returns the evaluations with their data sets open: what is wrong with any is said before any is done.

    Raises:
        UserError: all that is wrong.
    """

    def opened(one: Wanted) -> Evaluation:
        def source(spec: str, split: str, needs: tuple[str, ...]) -> Source:
            if "{root}" in spec and root is None:
                raise UserError(f"{spec} has {{root}}: say what that is with --root=FOLDER")
            return open_source(spec.replace("{root}", root or ""), data_dir=data_dir, default_split=split, needs=needs)

        with about(one.dataset):
            changes = dict(one.options)
            named = changes.get("classnames", options.classnames) is not None
            task = _made_for(source(one.dataset, "test", ("image",)), named) if one.task == "auto" else one.task
            needs = task_of(task).needs
            test = source(one.dataset, "test", needs)
            if task == "linear_probe":
                train = source(one.dataset if one.train is None else one.train, "train", needs)
                validation = one.validation and source(one.validation, "validation", needs)
                _check_apart(test, train, "train")
                _check_apart(test, validation, "validation")
                changes |= {"train": train, "validation": validation}
            evaluation = Evaluation(task, test, dataclasses.replace(options, **changes), one.main)
            known = task_of(task).metrics(evaluation.options)
            if unknown := [name for name in one.main if name not in known]:
                raise UserError(f"{unknown[0]!r} is no metric of {task}{nearest(unknown[0], known)}")
        return evaluation

    return all_of(*((lambda one=one: opened(one)) for one in wanted))


def _made_for(source: Source, named: bool) -> str:
    """Returns the task for a data set: class names, its own or `named`, are there to be told apart."""
    return "zeroshot_classification" if source.classnames or named else "zeroshot_retrieval"


def _check_apart(test: Source, other: Source | None, flag: str) -> None:
    """Raises UserError where a probe would learn from what it is tested on."""
    if other is not None and other.fingerprint() == test.fingerprint():
        raise UserError(
            f"a linear probe would learn from what it is tested on, {test.name}:{test.split}; name something else with "
            f"--{flag}=SPEC"
        )


def check_averaged(evaluations: Sequence[Evaluation]) -> None:
    """Raises UserError where an evaluation would not find the metrics that count in the average."""
    for one in evaluations:
        if missing := set(one.counts) - set(task_of(one.task).metrics(one.options)):
            raise UserError(f"{one.name} would have no {min(missing)} to average: ask for it with --recall_k")


def write_average(folder: AnyPath, suite: Suite, done: Sequence[Done]) -> float:
    """Writes a suite's scores and their average into FOLDER/suites, and returns the average.

    Raises:
        UserError: the file cannot be written.
    """
    scores = {one.evaluation.name: one.evaluation.score(one.written["metrics"]) for one in done}
    content = {"suite": suite.name, "model": done[0].written["model"], "pretrained": done[0].written["pretrained"]}
    content |= {"average": sum(scores.values()) / len(scores), "scores": scores}
    write_text(folder / "suites" / f"{suite.name}.json", json.dumps(content, indent=2) + "\n")
    return content["average"]
