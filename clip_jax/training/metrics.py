"""What a run says of itself: `metrics.jsonl`, the same scalars for other viewers, and a bar on the screen."""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator

import jax
import rich.console
import rich.progress

from clip_jax.config import Config
from clip_jax.training.feed import Bad, loggable, merged, total
from clip_jax.training.sinks import sinks
from clip_jax.training.step_lines import StepLines, read_lines
from clip_jax.workdir import Workdir

QUIET_SECONDS = 10  # between two lines where there is no terminal to draw a bar on


class MetricsLog:
    """Appends one JSON object a logged step, and sends the same scalars elsewhere; nothing without a workdir."""

    def __init__(self, workdir: Workdir | None, config: Config, *, resumed_at: int):
        self._writes = workdir is not None
        if workdir is None:
            return
        self._lines = StepLines(workdir.metrics_file, resumed_at=resumed_at)
        self._sinks = sinks(workdir, config, resumed_at=resumed_at)

    def described(self) -> list[str]:
        """Returns where the scalars go, as far as it needs saying."""
        return [sink.said for sink in self._sinks if sink.said] if self._writes else []

    def write(self, step: int, scalars: dict[str, int | float], bad: Bad) -> None:
        """Writes one line."""
        if not self._writes:
            return
        self._lines.write({"step": step, **scalars, **loggable(bad)})
        for sink in self._sinks:
            sink.write(step, scalars | {"bad_records": total(bad)})

    def flush(self) -> None:
        """Returns when all lines are there: a run that goes on from here will look for them."""
        if self._writes:
            self._lines.flush()
            for sink in self._sinks:
                sink.flush()

    def bad(self) -> Bad:
        """Returns what could not be read in the whole run, by its own lines."""
        if not self._writes:
            return {}
        self._lines.flush()
        lines = read_lines(self._lines.path)
        return merged([line.get("bad_records", {}) for line in lines])

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error) -> None:
        if self._writes:
            self._lines.close()
            for sink in self._sinks:
                sink.close(failed=kind is not None)


class StepClock:
    """Measures the steps since the last lap: pairs a second, and the share of the time that devices waited for data.

    The host runs ahead of the devices: that it waits for a batch costs nothing before they are done with the last one.
    """

    def __init__(self, global_batch: int):
        self._global_batch = global_batch
        self._steps = 0
        self._since = time.monotonic()
        self._waits: list[tuple[float, float, concurrent.futures.Future[float] | None]] = []  # asked, came, idle since
        self._watcher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="step-clock")
        self._idle_since: concurrent.futures.Future[float] | None = None

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time of its block as waiting, as far as the devices are idle in it."""
        asked = time.monotonic()
        yield
        self._waits.append((asked, time.monotonic(), self._idle_since))

    def dispatched(self, result: jax.Array) -> None:
        """Notes that a step has begun, of which this is a result; the time when it is done is noted beside."""
        self._steps += 1
        self._idle_since = self._watcher.submit(_time_when_ready, result)

    def lap(self) -> dict[str, float]:
        """Returns pairs_per_second and data_wait, and starts anew; waits until the last step is done."""
        if self._idle_since is not None:
            self._idle_since.result()
        waited = sum(
            max(0.0, came - max(asked, asked if idle is None else idle.result())) for asked, came, idle in self._waits
        )
        now = time.monotonic()
        seconds = now - self._since
        scalars = {"pairs_per_second": self._steps * self._global_batch / seconds, "data_wait": waited / seconds}
        self._steps, self._since, self._waits = 0, now, []
        return scalars

    def __enter__(self) -> "StepClock":
        return self

    def __exit__(self, *error) -> None:
        self._watcher.shutdown(wait=False)


def _time_when_ready(result: jax.Array) -> float:
    result.block_until_ready()
    return time.monotonic()


class Progress:
    """A bar with the latest metrics and the time left; now and then a line where there is no terminal."""

    def __init__(
        self, total_steps: int, *, done: int, quiet: bool = False, console: rich.console.Console | None = None
    ):
        self._console = console or rich.console.Console(stderr=True, quiet=quiet)
        self._bar = rich.progress.Progress(
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(bar_width=None),  # what the words leave of the line
            rich.progress.TextColumn("{task.fields[said]}"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("left"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=done, said="compiling")
        self._total_steps = total_steps
        self._started = self._last_line = time.monotonic()
        self._compiled: tuple[int, float] | None = None  # the first step shown, and when

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._bar.__exit__(*error)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, scalars: dict[str, int | float]) -> None:
        """Shows the latest metrics."""
        accuracy = (scalars["image_to_text_accuracy"] + scalars["text_to_image_accuracy"]) / 2
        said = f"loss {scalars['loss']:.4f} · accuracy {accuracy:.0%} · {scalars['pairs_per_second']:,.0f} pairs/s"
        if "mfu" in scalars:
            said += f" · MFU {scalars['mfu']:.0%}"
        self._bar.update(self._task, said=said)
        now = time.monotonic()
        if self._compiled is None:
            self._compiled = step, now
            self.say(f"compiled, and at step {step} after {now - self._started:.1f} s")
        elif not self._console.is_terminal and (now - self._last_line > QUIET_SECONDS or step == self._total_steps):
            first, since = self._compiled
            left = (now - since) / (step - first) * (self._total_steps - step)
            self.say(f"step {step}/{self._total_steps} · {said} · {left:.0f} s left")
            self._last_line = now
