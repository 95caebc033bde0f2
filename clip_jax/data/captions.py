"""The captions of a record, out of the bytes or values that hold them.

A caption key names where they are: a file of the record (`txt`), a feature or a column (`captions`), or a field inside
(`json.caption`, `captions.text`). One value may hold several.
"""

import json
from collections.abc import Iterable
from typing import Any

from clip_jax.data.problems import BadRecord, Problem

LONGEST = 1 << 16  # bytes; more is not a caption, and takes seconds to tokenize


def of(values: Iterable[bytes | str]) -> tuple[str, ...]:
    """Returns the captions that say something, as they are.

    Raises:
        BadRecord: there is none; for what reason the last was none.
    """
    captions, problem = [], Problem.NO_CAPTION
    for value in values:
        if len(value) > LONGEST:
            problem = Problem.LONG_CAPTION
            continue
        try:
            text = value if isinstance(value, str) else value.decode("utf-8")
            text.encode("utf-8")  # JSON can hold half a character
        except UnicodeError:
            problem = Problem.NOT_TEXT
            continue
        if text.strip():
            captions.append(text)
    if not captions:
        raise BadRecord(problem)
    return tuple(captions)


def within(value: Any, path: Iterable[str]) -> list[bytes | str]:
    """Returns the texts that lie in a value under a path of fields: of one text itself, of a list each of its items."""
    for name in path:
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            value = [item.get(name) for item in value if isinstance(item, dict)]
        else:
            value = value.get(name) if isinstance(value, dict) else None
    several = value.tolist() if hasattr(value, "tolist") else value
    several = several if isinstance(several, list | tuple) else [several]
    return [text for text in several if isinstance(text, bytes | str)]


def parsed(data: bytes) -> dict[str, Any]:
    """Returns what a record's JSON file says.

    Raises:
        BadRecord: it is no JSON object.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord(Problem.NOT_JSON) from error
    if not isinstance(content, dict):
        raise BadRecord(Problem.NOT_JSON)
    return content
