"""What `eval.py` does: models one after the other, data sets one after the other, one table, one page."""

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from clip_jax import distributed, pretrained, sharding
from clip_jax.config import MeshConfig
from clip_jax.data.sources import Source, open_source
from clip_jax.errors import UserError, nearest
from clip_jax.evaluation import run, suite
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.run import Done, Evaluation
from clip_jax.evaluation.suite import Suite, Wanted
from clip_jax.evaluation.tasks import TASKS, Options
from clip_jax.files import AnyPath, place
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.download import cache

FEATURES_TASK = "features"  # writes what others evaluate
MODELS = 2  # side by side


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the user wants, in the words of `eval.py`'s flags."""

    model: list[str]
    task: str
    dataset: list[str]
    suite: str | None
    root: str | None
    output: str | None
    resume: bool
    report: str | None
    data_dir: str | None
    classnames: str | None
    templates: str | None
    dump_classnames: bool
    dump_templates: bool
    recall_k: list[str]
    train: str | None
    validation: str | None
    fewshot_k: int
    seed: int
    feature: str | None
    dtype: str
    batch_size: int

    def __post_init__(self):
        if (self.suite is None) == (not self.dataset):
            raise UserError("--dataset is missing (any number of them), or --suite=FILE: one of the two")
        if len(self.model) > MODELS:
            raise UserError(f"--model is given {len(self.model)} times: {MODELS} models at most, side by side")
        if self.batch_size < 1:
            raise UserError(f"--batch_size={self.batch_size} should be at least 1")
        if wrong := [k for k in self.recall_k if not k.isdecimal() or int(k) < 1]:
            raise UserError(f"--recall_k has {wrong[0]!r}: should be whole numbers above 0, such as 1,5,10")
        if self.task not in ("auto", FEATURES_TASK, *TASKS):
            raise UserError(f"unknown task {self.task!r}{nearest(self.task, ('auto', FEATURES_TASK, *TASKS))}")
        self._check_ignored()

    def _check_ignored(self) -> None:
        """Raises UserError for a flag that would be given for nothing."""
        learning = ("train", "validation", "feature", "fewshot_k")
        ignored, why = (), ""
        if self.suite is not None:
            ignored, why = ("task", "train", "validation"), "with --suite: its file says that of each evaluation"
        elif self.task == FEATURES_TASK:
            ignored = ("resume", "report", "classnames", "templates", "train", "validation", "fewshot_k")
            why = f"with --task={FEATURES_TASK}"
        elif self.task != "linear_probe":
            ignored, why = learning, f"with --task={self.task}: it is for linear_probe"
        nothing = (None, False, -1, "auto")
        if given := [name for name in ignored if getattr(self, name) not in nothing]:
            raise UserError(f"--{given[0]} says nothing {why}; leave it out")

    def options(self) -> Options:
        return Options(
            classnames=self.classnames,
            templates=self.templates,
            cache=cache("classifiers"),
            recalls=tuple(map(int, self.recall_k)),
            fewshot_k=self.fewshot_k,
            seed=self.seed,
            feature=self.feature or "pooled",
            dump_classnames=self.dump_classnames,
            dump_templates=self.dump_templates,
        )

    def wanted(self) -> Suite:
        """Returns the evaluations by their words."""
        if self.suite is not None:
            return suite.read(self.suite)
        learning = {"train": self.train, "validation": self.validation}
        return Suite("", [Wanted(dataset, self.task, **learning) for dataset in self.dataset])


def evaluate(asked: Asked) -> list[Done]:
    """Does all that is asked, prints one table, and returns every evaluation.

    Raises:
        UserError: a model or data set that cannot be had, before anything is done; or what went wrong on the way, when
            the rest is done and shown.
    """
    if asked.task == FEATURES_TASK:
        return _write_features(asked)
    wanted = asked.wanted()
    evaluations = suite.open_all(wanted.wanted, asked.options(), root=_expanded(asked.root), data_dir=asked.data_dir)
    if asked.suite is not None:
        suite.check_averaged(evaluations)
    bundles = [pretrained.read(model) for model in asked.model]
    file_of = _places(asked, evaluations, bundles)
    _agree(asked, [evaluation.source for evaluation in evaluations], bundles)
    done, averages, problems = [], [], []
    for place_of in file_of:
        model = _on_all_devices(bundles.pop(0), asked)
        found, wrong = run.evaluate_all(model, evaluations, place_of, resume=asked.resume)
        del model  # the next one takes its memory
        done, problems = done + found, problems + wrong
        if asked.suite is not None and not wrong:
            folder = place_of(evaluations[0]).parent
            averages.append(distributed.of_first(functools.partial(suite.write_average, folder, wanted, found)))
    if done:
        run.show(done, averages)
    if asked.report is not None and jax.process_index() == 0:
        _write_page(asked, done)
    if problems:
        many = len(evaluations) * len(asked.model) > 1
        raise UserError(f"{len(problems)} could not be done: {'; '.join(problems)}" if many else problems[0])
    return done


def _agree(asked: Asked, sources: Sequence[Source], bundles: Sequence[Bundle]) -> None:
    """Raises UserError when the processes were not told the same, or have not the same data and weights."""
    facts = {"what is asked": dataclasses.asdict(asked)}
    facts |= {"the data": [source.fingerprint() for source in sources]}
    distributed.agree(facts | {"the models": [bundle.fingerprint() for bundle in bundles]})


def _write_page(asked: Asked, done: list[Done]) -> None:
    """Writes the page of what was done for every model."""
    from clip_jax.evaluation import page

    times = collections.Counter(one.evaluation.name for one in done)
    whole = [one for one in done if times[one.evaluation.name] == len(asked.model)]
    if whole:
        run.say(str(page.write(place(_expanded(asked.report)), whole)))


def _on_all_devices(bundle: Bundle, asked: Asked) -> OnMesh:
    return OnMesh.of(bundle, sharding.make_mesh(MeshConfig()), dtype=asked.dtype, batch_size=asked.batch_size)


def _places(
    asked: Asked, evaluations: Sequence[Evaluation], bundles: Sequence[Bundle]
) -> list[Callable[[Evaluation], AnyPath]]:
    """Returns where the results of each model go.

    Raises:
        UserError: there is no place, or one for two results.
    """
    names = [evaluation.name for evaluation in evaluations]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two evaluations would write {twice[0]}.json: do one of them alone, with another --output")
    slugs = [re.sub(r"\W+", "_", _expanded(name)).strip("_") for name in asked.model]
    if len(set(slugs)) < len(slugs):
        slugs = [f"{i}_{slug}" for i, slug in enumerate(slugs)]
    places = []
    for model, bundle, slug in zip(asked.model, bundles, slugs, strict=True):
        if asked.output is None and bundle.results is None:
            raise UserError(f"{model} is no run, so --output is missing: the JSON file, or of several the folder")
        output = bundle.results if asked.output is None else place(_expanded(asked.output))
        places.append(_files(output, asked, evaluations, slug))
    return places


def _expanded(path: str | None) -> str | None:
    return path and os.path.expanduser(path)  # noqa: PTH111 (Path's own fails for a user that there is not)


def _files(
    output: AnyPath, asked: Asked, evaluations: Sequence[Evaluation], slug: str
) -> Callable[[Evaluation], AnyPath]:
    """Returns the file of an evaluation's result."""
    if asked.output is not None and output.suffix == ".json":
        if len(evaluations) * len(asked.model) > 1 or asked.suite is not None:
            raise UserError(f"--output={asked.output} is one file, and there are several results: name a folder")
        return lambda evaluation: output
    folder = output / slug if asked.output is not None and len(asked.model) > 1 else output
    return lambda evaluation: folder / f"{evaluation.name}.json"


def _write_features(asked: Asked) -> list[Done]:
    """Writes the features of data sets, in folders of their names where there are several."""
    from clip_jax.evaluation import features

    if len(asked.model) > 1 or asked.output is None or asked.suite is not None:
        raise UserError(
            "--task=features takes one --model, any number of --dataset, and --output, the folder to write to"
        )
    options = {"data_dir": asked.data_dir, "default_split": "test", "needs": ("image",)}
    sources = [open_source(spec, **options) for spec in asked.dataset]
    bundle = pretrained.read(asked.model[0])
    _agree(asked, sources, [bundle])
    model = _on_all_devices(bundle, asked)
    for source in sources:
        folder = Path(_expanded(asked.output)) / (f"{source.name}_{source.split}" if len(sources) > 1 else "")
        features.write(model, source, folder, feature=asked.feature or "embedding")
        run.say(str(folder))
    return []
