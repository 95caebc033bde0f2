"""Stand-in until helper B's is merged."""

from pathlib import Path

from clip_jax.architecture import Tokenize
from clip_jax.errors import UserError
from clip_jax.weights.bundle import Bundle, read_json


def read(folder: Path, clean: str) -> tuple[Tokenize, str | None]:
    """Returns how the folder's tokenizer makes ids, and what its tokenizer.json says."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    return Tokenize("file", clean=clean, pad_id=config.get("pad_id", 0)), (folder / "tokenizer.json").read_text()


def files(bundle: Bundle, family: str) -> dict[str, str]:
    """Returns the tokenizer's files of a family's folder: content by name."""
    if bundle.tokenizer is None:
        return {}
    config = f'{{"pad_id": {bundle.architecture.tokenize.pad_id}, "sep_token": "[SEP]"}}'
    return {"tokenizer.json": bundle.tokenizer, "tokenizer_config.json": config}
