"""All that is noted of a run, step by step: for the screen, for `metrics.jsonl` and whoever shows it, and of what goes
wrong. Metrics are read only when they are logged: the devices are never waited for in between."""

import contextlib
from typing import Any

import jax

from clip_jax.evaluation.run import Evaluation
from clip_jax.training.evaluation import RunEvaluation
from clip_jax.training.feed import BadLimit, Feed, in_words
from clip_jax.training.incidents import Incidents
from clip_jax.training.metrics import MetricsLog, Progress, StepClock
from clip_jax.training.profiler import Profiler, Window
from clip_jax.training.program import Program
from clip_jax.training.state import TrainState
from clip_jax.training.step import Metrics
from clip_jax.training.usage import Usage
from clip_jax.typing import Batch
from clip_jax.workdir import Workdir


class Journal:
    """What is noted between the steps of one run; the first process writes, all of them know.

    After `log` and `unlogged`, `problem` says why the run is to stop, None: it is not; after `log`, `measured` what the
    state was found to be.
    """

    def __init__(
        self,
        program: Program,
        folder: Workdir,
        feed: Feed,
        evaluations: list[Evaluation],
        *,
        start: int,
        unlogged: dict[str, Any],
        traced: Window | None,
    ):
        """Goes on from what `unlogged` gave at step `start`; `traced` is the window of the profiler."""
        config, writes = program.config, jax.process_index() == 0
        self._feed, self._steps = feed, program.steps.total
        self._evaluation = RunEvaluation(evaluations, program, folder) if evaluations else None
        self._evaluation_every, self._log_every = config.evaluation.every, config.log_every
        self._global_batch = config.data.global_batch
        seen = start * self._global_batch
        self._bad_limit = BadLimit(config.data.bad_limit, seen=seen, state=unlogged.get("bad_window"))
        self._usage = Usage.of(program)
        self._text_lengths: list[jax.Array] = []  # of the steps since the last that was logged
        self.problem: str | None = None
        self.measured: dict[str, float] = {}
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(MetricsLog(folder if writes else None, config, resumed_at=start))
            self._progress = stack.enter_context(Progress(self._steps, done=start, quiet=not writes))
            self._incidents = stack.enter_context(
                Incidents(
                    folder.incidents_file if writes else None,
                    feed.records,
                    config.skip_limit,
                    unlogged.get("incidents"),
                )
            )
            self._clock = stack.enter_context(StepClock(self._global_batch))
            self._profiler = stack.enter_context(Profiler(traced if writes else None, folder.profile, self.say))
            self._open = stack.pop_all()

    def begins(self, lines: list[str]) -> None:
        """Says what there is to say before the first step."""
        for line in (*lines, self._usage.described(), *self._log.described()):
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.say(line)

    def batch(self, step: int) -> Batch:
        """Returns the global batch of a step, and counts what the devices wait for it."""
        self._profiler.begins(step)
        with self._clock.waiting_for_data():
            return next(self._feed)

    def dispatched(self, step: int, metrics: Metrics) -> None:
        """Notes that a step has begun, of which these will be the results."""
        loss = metrics["loss"]
        self._clock.dispatched(loss)
        self._incidents.dispatched(step, loss, metrics["finite"])
        self._profiler.dispatched(step, loss)
        self._progress.advance(step)
        if "text_length" in metrics:
            self._text_lengths.append(metrics["text_length"])

    def log(self, step: int, metrics: Metrics, state: TrainState) -> bool:
        """Returns whether it is this step's turn to be logged, and perhaps measured; does both."""
        self.measured = {}
        evaluates = self._evaluation is not None and every(self._evaluation_every, step, self._steps)
        if not (step == 1 or every(self._log_every, step, self._steps) or evaluates):
            return False
        scalars = {name: value.item() for name, value in jax.device_get(metrics).items() if name != "finite"}
        scalars |= self._clock.lap()
        lengths, self._text_lengths = [int(n) for n in jax.device_get(self._text_lengths)], []
        scalars |= {"text_length": sum(lengths) / len(lengths)} if lengths else {}
        scalars |= self._usage.scalars(scalars["pairs_per_second"], lengths)
        scalars["data_wait"], bad = self._feed.report(scalars["data_wait"], self.say)
        self._incidents.read(self.say)
        if evaluates:
            self.measured = self._evaluation.measured(state, self.say)
            self._clock.lap()  # what it took is no training
        self._log.write(step, scalars | {"skipped": self._incidents.skipped} | self.measured, bad)
        self._progress.show(step, scalars)
        self.problem = self._bad_limit.passed(step * self._global_batch, bad) or self._incidents.too_many()
        return True

    def unlogged(self) -> dict[str, Any]:
        """Returns what a run that goes on from here has to know of the steps since the last that was logged.

        All processes call it at the same step; it waits until that is done, and all lines before are there.
        """
        self._incidents.read(self.say)
        self._log.flush()
        self.problem = self.problem or self._incidents.too_many()  # what is saved has forgotten a row that has ended
        return {
            "incidents": self._incidents.state(),
            "bad_records": self._feed.unreported(),
            "bad_window": self._bad_limit.state(),
        }

    def ends(self) -> None:
        """Says what there is to say after the last step."""
        if bad := self._log.bad():
            self.say(f"left out {in_words(bad)}")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error) -> bool | None:
        return self._open.__exit__(*error)


def every(n: int, step: int, last: int) -> bool:
    """Returns whether something that happens every `n` steps, and at the last one, happens now."""
    return step % n == 0 or step == last
