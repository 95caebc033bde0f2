"""CLIP on JAX: the public names, and nothing else here. Heavy things are imported where they are used."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_jax.api import available_models, load
    from clip_jax.tokenizer import tokenize

__all__ = ["available_models", "load", "tokenize"]

_HOME = {"available_models": "clip_jax.api", "load": "clip_jax.api", "tokenize": "clip_jax.tokenizer"}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
