"""Stand-in for what helper B builds: tokenizer files of a folder, read and written."""

import json
from pathlib import Path

from clip_jax.architecture import Tokenize
from clip_jax.errors import UserError
from clip_jax.weights.bundle import Bundle


def read(folder: Path, clean: str) -> tuple[Tokenize, str | None]:
    """Returns how texts become ids, and the content of tokenizer.json where OpenAI's tokenizer is not it."""
    if (folder / "tokenizer.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        content = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return Tokenize("file", clean=settings.get("clean", clean), pad_id=settings.get("pad_id", 0)), content
    if (folder / "tokenizer_config.json").is_file():
        return Tokenize(), None
    raise UserError(f"{folder} has no tokenizer: no tokenizer.json")


def files(bundle: Bundle, family: str) -> dict[str, str]:
    """Returns the content of the files, by their names, that say a model's tokenizer."""
    tokenize = bundle.architecture.tokenize
    settings = json.dumps({"clean": tokenize.clean, "pad_id": tokenize.pad_id})
    texts = {"tokenizer_config.json": settings}
    return texts if bundle.tokenizer is None else texts | {"tokenizer.json": bundle.tokenizer}
