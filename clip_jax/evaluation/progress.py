"""How far a long part of an evaluation is: a bar where there is a terminal, elsewhere a line now and then."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import rich.console
import rich.progress

QUIET_SECONDS = 30  # between two lines


@contextlib.contextmanager
def progress(what: str, total: int, unit: str, *, shows: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told how many more are done; it shows them with their rate and the time that is left, in
    one process of several."""
    shows = shows and jax.process_index() == 0
    console = rich.console.Console(stderr=True)
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn(f"{{task.fields[rate]:,.0f}} {unit}/s"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=not (shows and console.is_terminal),
    )
    started = said = time.monotonic()
    done = 0

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        now = time.monotonic()
        rate = done / max(now - started, 1e-9)
        bar.update(task, advance=more, rate=rate)
        if shows and not console.is_terminal and now - said > QUIET_SECONDS:
            said, left = now, (total - done) / max(rate, 1e-9)
            words = f"{what}: {done:,} of {total:,} {unit} · {rate:,.0f} {unit}/s · {left:,.0f} s left"
            console.print(words, highlight=False, markup=False, soft_wrap=True)

    with bar:
        task = bar.add_task(what, total=total, rate=0.0)
        yield advance


def say(words: str) -> None:
    """Prints a line for people, from one process of several."""
    if jax.process_index() == 0:
        rich.console.Console(stderr=True).print(words, highlight=False, markup=False, soft_wrap=True)
