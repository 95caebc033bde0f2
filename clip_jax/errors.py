"""The one exception that says "you can mend this": what a script prints as one line, exiting with 2."""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class UserError(ValueError):
    """A mistake of the user's; the message names the value, the rule and the next move."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the closest known word, or the list of all when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


def nearest_few(word: str, known: Iterable[str], n: int = 3) -> str:
    """Returns "; the nearest are: X, Y, Z", where there are too many to list."""
    return f"; the nearest are: {', '.join(difflib.get_close_matches(word, known, n, cutoff=0))}"


@contextlib.contextmanager
def about(whose: Any) -> Iterator[None]:
    """Puts what a mistake is about, a file or a part of it, before the words of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{whose}: {error}") from error


def all_of(*calls: Callable[[], Any]) -> list[Any]:
    """Returns what the calls return.

    Raises:
        UserError: some of them raised one; says what each of them said.
    """
    results, problems = [], []
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))  # once, where two calls fail for one reason
    return results
