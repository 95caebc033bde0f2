"""The peers that are measured beside us, each where it is installed; a missing one is a gap with its reason.

Nothing is imported here that a project's own start would have to pay for: `groups/start.py` times it.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for `oracles`

OURS = "clip_jax"
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


def imported(who: str) -> Any:
    """Returns what `load` needs, all imports done.

    Raises:
        Gap: it is not installed.
    """
    if who == OURS:
        import clip_jax.api

        return clip_jax.api
    return module(who).CLIPModel if who == "transformers" else module(who)


def load(who: str, package: Any, path: Path) -> Any:
    """Returns the model in float32, ready to encode."""
    if who == OURS:
        import jax

        model, _ = package.load(path)
        jax.block_until_ready(model.placed)
        return model
    if who == "OpenAI":
        return package.load(str(path), device="cpu", jit=False)[0]
    if who == "OpenCLIP":
        return package.create_model(f"local-dir:{path}").eval()
    return package.from_pretrained(path).eval()
