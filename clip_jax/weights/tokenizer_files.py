"""Stand-in until helper B's is merged."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from clip_jax.architecture import Tokenize
from clip_jax.errors import UserError
from clip_jax.weights.bundle import Bundle, read_json


def read(folder: Path, clean: str, *, blank_sep: bool = False) -> tuple[Tokenize, str | None]:
    """Returns how the folder's tokenizer makes ids, and what its tokenizer.json says."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: there is no tokenizer")
    text = (folder / "tokenizer.json").read_text()
    config, tokenizer = read_json(folder / "tokenizer_config.json"), Tokenizer.from_str(text)
    blank_id = tokenizer.token_to_id(config["sep_token"]) if blank_sep else None
    return Tokenize("file", clean, tokenizer.token_to_id(config["pad_token"]), blank_id=blank_id), tokenizer.to_str()


def files(bundle: Bundle, family: str) -> dict[str, bytes]:
    """Returns the tokenizer's files of a family's folder: content by name."""
    if bundle.architecture.tokenize.kind == "clip":
        return {}
    if bundle.tokenizer is None:
        raise UserError(f"{bundle.origin} came without its tokenizer")
    rules, tokenizer = bundle.architecture.tokenize, Tokenizer.from_str(bundle.tokenizer)
    config = {"pad_token": tokenizer.id_to_token(rules.pad_id)}
    if rules.blank_id is not None:
        config["sep_token"] = tokenizer.id_to_token(rules.blank_id)
    return {"tokenizer.json": bundle.tokenizer.encode(), "tokenizer_config.json": json.dumps(config).encode()}
