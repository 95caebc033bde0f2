"""OpenCLIP's folders and state dicts, read and written.

FOLDER/open_clip_config.json         {"model_cfg": …, "preprocess_cfg": …}: clip_jax/weights/open_clip_config.py
FOLDER/open_clip_model.safetensors   the weights; other names and PyTorch's files are read too
FOLDER/tokenizer.json, …             where the tokenizer is not OpenAI's

Built-in towers have OpenAI's names. A text tower is at the root or under `text.`; SigLIP's image towers are timm's.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clip_jax.architecture import Architecture
from clip_jax.errors import UserError
from clip_jax.files import read_json
from clip_jax.models.clip import Definition
from clip_jax.models.variants import with_activation
from clip_jax.weights import folder, openai, timm, tokenizer_files
from clip_jax.weights.bundle import Bundle, variant_of
from clip_jax.weights.mapping import DType, Rule, export_tensors, flatten, import_tensors
from clip_jax.weights.open_clip_config import architecture_of, blanks_separator, config_of, is_timm
from clip_jax.weights.tensors import read_file, read_first

CONFIG, TENSORS = "open_clip_config.json", "open_clip_model.safetensors"
# What weights may be called; OpenCLIP takes the first that is there, and so do we.
WEIGHTS = (
    TENSORS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)

SCALARS = (
    Rule("logit_scale", "logit_scale", "->"),
    Rule("logit_bias", "logit_bias", "->"),
)
IMAGE = tuple(rule for rule in openai.RULES if rule.target.startswith("image/"))
TIMM_IMAGE = tuple(rule.inside("visual.trunk", "image") for rule in timm.RULES)
TEXT = tuple(rule for rule in openai.RULES if rule.target.startswith("text/") and rule.target != "text/projection")
MATRIX = (Rule("text_projection", "text/projection", "D E -> D E"),)
LINEAR = (
    Rule("text_projection.weight", "text/projection", "E D -> D E"),
    Rule("text_projection.bias", "text/projection_bias", "E -> E"),
)

# Names of tensors that are no weights: causal masks, of blocks and of the whole tower.
IGNORED = r"((visual\.|text\.)?transformer\.resblocks\.\d+\.|text\.)?attn_mask"


def is_folder(path: Path) -> bool:
    """Returns whether there is a folder of OpenCLIP's; of one that is Hugging Face's too the weights' name decides."""

    def has(name: str) -> bool:
        return os.path.isfile(path / name)  # noqa: PTH113 (Path's own fails for a name that is too long)

    own = [name for name in WEIGHTS if name.startswith("open_clip_")]
    return has(CONFIG) and (not has("config.json") or any(map(has, own)))


def read(path: Path, dtype: DType | None = None, *, activation: str | None = None) -> Bundle:
    """Returns the model in one of OpenCLIP's folders; floats in `dtype`, or where that is None as they are.

    An `activation` that is given is computed whatever the config and the weights say.

    Raises:
        UserError: a config that is not understood; then all that is wrong with tokenizer and weights: they are not
            there, they are damaged, or they are not the config's.
    """
    config = read_json(path / CONFIG)
    try:
        architecture = architecture_of(config)
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}") from error
    if activation is not None:
        architecture = with_activation(architecture, activation)
    problems, tokenizer, arrays = [], None, {}
    try:
        if architecture.tokenize.kind == "file":
            clean, blank_sep = architecture.tokenize.clean, blanks_separator(config)
            tokenize, tokenizer = tokenizer_files.read(path, clean, blank_sep=blank_sep)
            architecture = dataclasses.replace(architecture, tokenize=tokenize)
    except UserError as error:
        name = config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
        problems.append(f"{error}; {CONFIG} names {name!r}, whose tokenizer belongs into the folder")
    try:
        tensors, file = read_first(path, WEIGHTS)
        remedy = f'write "quick_gelu": true into the model_cfg of {path / CONFIG}, or insist by activation="quick_gelu"'
        whose = f"{file}, by {path / CONFIG}"
        arrays = _arrays(tensors, architecture, dtype, whose=whose, remedy=remedy, insists=activation is not None)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return Bundle(architecture, arrays, variant_of(architecture, path.resolve().name), str(path), tokenizer)


def read_state_dict(path: Path, architecture: Architecture, dtype: DType | None = None) -> Bundle:
    """Returns the model whose weights are in a lone file, by OpenCLIP's names; the architecture is what it is told.

    Raises:
        UserError: not such a file, a damaged one, or tensors that are not the architecture's; all of them.
    """
    name = variant_of(with_activation(architecture, "quick_gelu"), "")
    remedy = f"say activation='quick_gelu'{f' or variant={name!r}' if name else ''}"
    arrays = _arrays(read_file(path), architecture, dtype, whose=str(path), remedy=remedy)
    return Bundle(architecture, arrays, variant_of(architecture, path.stem), str(path))


def write(path: Path, bundle: Bundle) -> None:
    """Writes the model as a folder that OpenCLIP opens as "local-dir:FOLDER", in the bundle's dtypes.

    Raises:
        UserError: what the format cannot hold, all of it; or a folder that cannot be written.
    """
    config = config_of(bundle.architecture)
    texts = {CONFIG: json.dumps(config, indent=2) + "\n"} | tokenizer_files.files(bundle, "open_clip")
    rules = rules_of(bundle.architecture, custom_text=config["model_cfg"].get("custom_text", False))
    folder.write(path, texts, TENSORS, export_tensors(rules, bundle.arrays), replaces=is_folder(path))


def rules_of(architecture: Architecture, *, custom_text: bool) -> tuple[Rule, ...]:
    """Returns the table of an architecture's weights; `custom_text`: the text tower is under `text.`."""
    text = (*TEXT, *(LINEAR if architecture.text.projection_bias else MATRIX))
    if custom_text:
        text = tuple(dataclasses.replace(rule, source=f"text.{rule.source}") for rule in text)
    return (*SCALARS, *text, *(TIMM_IMAGE if is_timm(architecture.image) else IMAGE))


def _arrays(
    tensors: Mapping[str, np.ndarray],
    architecture: Architecture,
    dtype: DType | None,
    *,
    whose: str,
    remedy: str,
    insists: bool = False,
) -> Mapping[str, np.ndarray]:
    """Returns our arrays, filled from a file's tensors; `remedy`: how to say that they are computed with QuickGELU."""
    weights = {name: x for name, x in tensors.items() if not re.fullmatch(IGNORED, name)}
    try:
        if weights.keys() >= openai.NUMBERS:
            if not insists and architecture != with_activation(architecture, "quick_gelu"):
                raise UserError(
                    f"these weights are OpenAI's ({', '.join(sorted(openai.NUMBERS))} are among them), trained with "
                    f"QuickGELU; computed with another GELU ({architecture.text.activation!r}) they lose several "
                    f"points of accuracy, and nothing says so: {remedy}"
                )
            weights = {name: x for name, x in weights.items() if name not in openai.NUMBERS}
        scalars = {rule.source for rule in SCALARS}  # some have been trained as vectors of one element
        weights = {name: x.reshape(()) if name in scalars and x.size == 1 else x for name, x in weights.items()}
        rules = rules_of(architecture, custom_text="text.positional_embedding" in weights)
        return import_tensors(rules, weights, flatten(Definition(architecture).shapes()), dtype)
    except UserError as error:
        raise UserError(f"{whose}: {error}") from error
