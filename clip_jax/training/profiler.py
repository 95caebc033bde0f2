"""A window of steps under JAX's profiler: what devices and host did in them, kernel by kernel."""

import contextlib
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from clip_jax.elsewhere import Elsewhere
from clip_jax.errors import UserError
from clip_jax.files import AnyPath


class Window(NamedTuple):
    """The first and the last step that are looked at."""

    first: int
    last: int


def window(text: str, *, done: int, total: int) -> Window:
    """Returns the window "FIRST:LAST" of a run that has `total` steps, of which some are done.

    Raises:
        UserError: it is none, the run will not see it, or the profiler would kill the run.
    """
    platform = jax.default_backend()
    if platform != "tpu" and not jax.config.jax_platforms and importlib.util.find_spec("libtpu"):
        # It is loaded, finds no TPU, and stays: the profiler calls it, and where it is newer than jaxlib, crashes.
        only = "cuda,cpu" if platform == "gpu" else platform
        raise UserError(
            f"--profile: libtpu is installed here, and there is no TPU; set JAX_PLATFORMS={only} to leave it out"
        )
    made = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", text)
    if not made:
        raise UserError(f"--profile={text} should be the first and the last step to look at, as in --profile=20:22")
    first, last = map(int, made.groups())
    if not done < first <= last <= total:
        steps = f"steps {done + 1:,} to {total:,}" if done < total else f"none, for it is done with all {total:,} steps"
        raise UserError(f"--profile={text} should lie, FIRST before LAST, in what the run has before it: {steps}")
    return Window(first, last)


class Profiler:
    """Writes a trace of the window's steps into a folder; without a window it does nothing."""

    def __init__(self, window: Window | None, folder: AnyPath, say: Callable[[str], None]):
        self._window, self._folder, self._say = window, folder, say
        self._last: jax.Array | None = None
        self._here, self._tracing = folder, False
        self._step = contextlib.ExitStack()  # the trace's mark of the step that goes on

    def begins(self, step: int) -> None:
        """Notes that a step begins, with its data."""
        if self._window is not None and step == self._window.first:
            jax.block_until_ready(self._last)  # so that nothing of the steps before is seen
            if isinstance(self._folder, Elsewhere):  # where JAX cannot write
                self._here = Path(tempfile.mkdtemp())
            jax.profiler.start_trace(self._here, create_perfetto_trace=True)
            self._tracing = True
        if self._tracing:
            self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def dispatched(self, step: int, result: jax.Array) -> None:
        """Notes that a step, of which this is a result, is on its way; at the window's last one, waits for it."""
        self._last = result
        self._step.close()
        if self._tracing and step == self._window.last:
            result.block_until_ready()
            self._stop()
            self._say(
                f"steps {self._window.first} to {step} are profiled in {self._folder}: open perfetto_trace.json.gz at "
                f"https://ui.perfetto.dev, or pip install xprof and run `xprof {self._folder}`"
            )

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error) -> None:
        self._step.close()
        if self._tracing:  # the run ends within the window
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        if isinstance(self._folder, Elsewhere):
            self._folder.take(self._here)
            shutil.rmtree(self._here)
