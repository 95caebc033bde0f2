"""What a run is measured by while it trains: data sets and tasks, on all devices, by the averaged weights where there
are any."""

import math
from collections.abc import Callable

from clip_jax.config import Config
from clip_jax.errors import UserError, about, nearest
from clip_jax.evaluation import run, suite
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.run import Evaluation
from clip_jax.evaluation.suite import Wanted
from clip_jax.evaluation.tasks import Options, task_of
from clip_jax.tokenizer import make
from clip_jax.training.program import Program
from clip_jax.training.state import TrainState
from clip_jax.workdir import Workdir


def open_evaluations(config: Config) -> list[Evaluation]:
    """Returns what the config wants to be measured, its data sets opened.

    Raises:
        UserError: no such task, or a data set that cannot be opened or has not what the task needs.
    """
    evaluations = []
    for task, spec in config.evaluation.measures():
        with about(f"evaluation.tasks={task}={spec}"):
            evaluations += suite.open_all([Wanted(spec, task)], Options(), data_dir=config.data.data_dir)
    if config.keep_best is not None and not evaluations:
        raise UserError(
            f"keep_best={config.keep_best!r} is a metric of evaluation.tasks, which is not set: set it to what is to "
            "be measured, such as zeroshot_classification=tfds:captioned_digits:test, or leave keep_best out"
        )
    known = [f"{one.name}/{metric}" for one in evaluations for metric in task_of(one.task).metrics(one.options)]
    if config.keep_best is not None and config.keep_best not in known:
        raise UserError(
            f"keep_best={config.keep_best!r} is no metric of evaluation.tasks{nearest(config.keep_best, known)}"
        )
    return evaluations


class RunEvaluation:
    """Evaluates a run as it goes, and writes what it finds as `eval.py` does, in WORKDIR/eval/<step>."""

    def __init__(self, evaluations: list[Evaluation], program: Program, folder: Workdir):
        self._evaluations, self._folder = evaluations, folder
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
        for evaluation in self._evaluations:
            name, metrics = evaluation.name, task_of(evaluation.task).metrics(evaluation.options)
            file = self._folder.evaluation(step) / f"{name}.json"
            try:
                found = run.evaluate(self._model, evaluation, file, draws=False, shows=False).result.metrics
            except UserError as error:  # embeddings that are not finite, a file that cannot be written
                say(f"step {step}: {name} cannot be measured: {error}")
                continue
            known = {metric: found[metric] for metric in metrics if math.isfinite(found[metric])}
            say(f"step {step}: {name}: {', '.join(f'{metric} {value:.2%}' for metric, value in known.items())}")
            scalars |= {f"{name}/{metric}": value for metric, value in known.items()}
        self._model.weights = None  # the next step takes their memory
        return scalars
