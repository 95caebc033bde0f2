"""The peers that are measured beside us, each where it is installed; a missing one is a gap with its reason."""

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

MODULES = {"OpenAI": "clip", "OpenCLIP": "open_clip", "transformers": "transformers"}
LOADERS = {"OpenAI": "openai_clip", "OpenCLIP": "open_clip", "transformers": "transformers"}  # in tests/oracles.py


class Gap(Exception):
    """A peer cannot be measured here; says why."""


def module(name: str) -> ModuleType:
    """Returns a peer's package.

    Raises:
        Gap: it is not installed, or does not import.
    """
    try:
        import oracles  # which lets torchvision load without its C++ part, and needs pytest
    except ImportError:
        try:
            return importlib.import_module(MODULES[name])
        except ImportError as error:
            raise Gap(f"does not import: {error}") from error
    try:
        return getattr(oracles, LOADERS[name])()
    except oracles.pytest.skip.Exception as gap:
        raise Gap(str(gap)) from None


def available(make: Callable[[str], Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns what could be made for each name, and why the rest could not."""
    made, gaps = {}, {}
    for who in names:
        try:
            made[who] = make(who)
        except Gap as gap:
            gaps[who] = str(gap)
    return made, gaps
