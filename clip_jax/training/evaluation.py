"""What a run is measured by while it trains: data sets and tasks, on all devices, by the averaged weights where there
are any."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from clip_jax.config import Config
from clip_jax.data.sources import Source, open_source
from clip_jax.errors import UserError, about, nearest
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.run import METRICS, NEEDS, TASKS, in_schema, write_result
from clip_jax.tokenizer import make
from clip_jax.training.program import Program
from clip_jax.training.state import TrainState
from clip_jax.workdir import Workdir


class Measure(NamedTuple):
    """A task on a data set."""

    task: str
    source: Source

    @property
    def name(self) -> str:
        """Returns what its result is called, in files and among the metrics."""
        return f"{self.source.name}_{self.source.split}_{self.task}"


def open_measures(config: Config) -> list[Measure]:
    """Returns what the config wants to be measured, its data sets opened.

    Raises:
        UserError: no such task, or a data set that cannot be opened or has not what the task needs.
    """
    measures = []
    for task, spec in config.evaluation.measures():
        with about(f"evaluation.tasks={task}={spec}"):
            if task not in TASKS:
                raise UserError(f"unknown task {task!r}{nearest(task, TASKS)}")
            source = open_source(spec, data_dir=config.data.data_dir, default_split="test", needs=NEEDS[task])
            if task == "zeroshot_classification" and not source.classnames:
                raise UserError("the data set has no classes; try zeroshot_retrieval")
        measures.append(Measure(task, source))
    if config.keep_best is not None and not measures:
        raise UserError(
            f"keep_best={config.keep_best!r} is a metric of evaluation.tasks, which is not set: set it to what is to "
            "be measured, such as zeroshot_classification=tfds:captioned_digits:test, or leave keep_best out"
        )
    known = [f"{measure.name}/{metric}" for measure in measures for metric in METRICS[measure.task]]
    if config.keep_best is not None and config.keep_best not in known:
        raise UserError(
            f"keep_best={config.keep_best!r} is no metric of evaluation.tasks{nearest(config.keep_best, known)}"
        )
    return measures


class Evaluation:
    """Measures a run, and writes what it finds as `eval.py` does, in WORKDIR/eval/<step>."""

    def __init__(self, measures: list[Measure], program: Program, folder: Workdir):
        self._measures, self._folder = measures, folder
        self._model = OnMesh(
            program.definition,
            program.mesh,
            make(program.architecture.tokenize, folder.tokenizer()),
            name=program.variant,
            pretrained=str(folder.path),
        )

    def measured(self, state: TrainState, say: Callable[[str], None]) -> dict[str, float]:
        """Returns all metrics of the state, by "DATASET_SPLIT_TASK/metric"; those that are not defined are left out.

        All processes call it at the same step; the first writes the files. What cannot be measured is said: the run
        goes on.
        """
        step, self._model.weights = int(state.step), state.averaged
        self._model.pretrained = str(self._folder.checkpoints / str(step))
        scalars: dict[str, float] = {}
        for measure in self._measures:
            try:
                metrics = TASKS[measure.task](self._model, measure.source, shows=False).metrics
            except UserError as error:  # embeddings that are not finite, an image that is damaged
                say(f"step {step}: {measure.name} cannot be measured: {error}")
                continue
            known = {name: value for name, value in metrics.items() if math.isfinite(value)}
            say(f"step {step}: {measure.name}: {', '.join(f'{name} {value:.2%}' for name, value in known.items())}")
            if jax.process_index() == 0:
                result = in_schema(self._model, measure.source, measure.task, metrics)
                write_result(self._folder.evaluation(step) / f"{measure.name}.json", result)
            scalars |= {f"{measure.name}/{name}": value for name, value in known.items()}
        self._model.weights = None  # the next step takes their memory
        return scalars
