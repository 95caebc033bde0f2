"""Hugging Face's folders: `CLIPModel` and `SiglipModel` (which fixed-resolution SigLIP 2 is, too), read and written.

FOLDER/config.json               the architecture: huggingface_config.py
FOLDER/model.safetensors         the weights, or an index and pieces of them; older folders have pytorch_model.bin
FOLDER/preprocessor_config.json  how images are prepared; newer folders may have it within processor_config.json
FOLDER/tokenizer.json …          the tokenizer
"""

import contextlib
import dataclasses
import functools
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from clip_jax.architecture import Preprocess
from clip_jax.errors import UserError, all_of
from clip_jax.files import whole
from clip_jax.models.clip import Definition
from clip_jax.weights import archive, tokenizer_files
from clip_jax.weights.bundle import Bundle, read_json, read_safetensors, variant_of
from clip_jax.weights.huggingface_config import architecture_of, config_of, family_of, image_size_of
from clip_jax.weights.mapping import DType, Rule, export_tensors, flatten, import_tensors, listed
from clip_jax.weights.preprocess_files import from_huggingface, to_huggingface

CONFIG, TENSORS = "config.json", "model.safetensors"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# The first that is there is read, as by `transformers`.
WEIGHTS = (TENSORS, f"{TENSORS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

NORM = (
    Rule("weight", "scale", "D -> D"),
    Rule("bias", "bias", "D -> D"),
)
MLP = (
    Rule("fc1.weight", "up/kernel", "F D -> D F"),
    Rule("fc1.bias", "up/bias", "F -> F"),
    Rule("fc2.weight", "down/kernel", "D F -> F D"),
    Rule("fc2.bias", "down/bias", "D -> D"),
)
BLOCK = (
    *(rule.inside("layer_norm1", "attention_norm", "[i]") for rule in NORM),
    Rule("self_attn.q_proj.weight", "attention/qkv/kernel[i, :, 0]", "(N K) D -> D N K"),
    Rule("self_attn.q_proj.bias", "attention/qkv/bias[i, 0]", "(N K) -> N K"),
    Rule("self_attn.k_proj.weight", "attention/qkv/kernel[i, :, 1]", "(N K) D -> D N K"),
    Rule("self_attn.k_proj.bias", "attention/qkv/bias[i, 1]", "(N K) -> N K"),
    Rule("self_attn.v_proj.weight", "attention/qkv/kernel[i, :, 2]", "(N K) D -> D N K"),
    Rule("self_attn.v_proj.bias", "attention/qkv/bias[i, 2]", "(N K) -> N K"),
    Rule("self_attn.out_proj.weight", "attention/out/kernel[i]", "D (N K) -> N K D"),
    Rule("self_attn.out_proj.bias", "attention/out/bias[i]", "D -> D"),
    *(rule.inside("layer_norm2", "mlp_norm", "[i]") for rule in NORM),
    *(rule.inside("mlp", "mlp", "[i]") for rule in MLP),
)
TOWERS = (
    Rule("text_model.embeddings.token_embedding.weight", "text/token_embedding", "V D -> V D"),
    Rule("text_model.embeddings.position_embedding.weight", "text/positional_embedding", "L D -> L D"),
    *(rule.inside("text_model.encoder.layers.{i}", "text/blocks") for rule in BLOCK),
    *(rule.inside("text_model.final_layer_norm", "text/post_norm") for rule in NORM),
    Rule("vision_model.embeddings.patch_embedding.weight", "image/patch_embed/kernel", "D C H W -> H W C D"),
    Rule("vision_model.embeddings.position_embedding.weight", "image/positional_embedding", "P D -> P D"),
    *(rule.inside("vision_model.encoder.layers.{i}", "image/blocks") for rule in BLOCK),
    *(rule.inside("vision_model.post_layernorm", "image/post_norm") for rule in NORM),
)
MAP_POOL = (
    Rule("probe", "probe", "1 1 D -> D"),
    Rule("attention.in_proj_weight", "qkv/kernel", "(T N K) D -> D T N K"),
    Rule("attention.in_proj_bias", "qkv/bias", "(T N K) -> T N K"),
    Rule("attention.out_proj.weight", "out/kernel", "D (N K) -> N K D"),
    Rule("attention.out_proj.bias", "out/bias", "D -> D"),
    *(rule.inside("layernorm", "norm") for rule in NORM),
    *(rule.inside("mlp", "mlp") for rule in MLP),
)
# By the `model_type` of a config.
RULES = {
    "clip": (
        Rule("logit_scale", "logit_scale", "->"),
        *TOWERS,
        Rule("text_projection.weight", "text/projection", "E D -> D E"),
        Rule("vision_model.embeddings.class_embedding", "image/class_embedding", "D -> D"),
        *(rule.inside("vision_model.pre_layrnorm", "image/pre_norm") for rule in NORM),  # their spelling
        Rule("visual_projection.weight", "image/projection", "E D -> D E"),
    ),
    "siglip": (
        Rule("logit_scale", "logit_scale", "1 ->"),
        Rule("logit_bias", "logit_bias", "1 ->"),
        *TOWERS,
        Rule("text_model.head.weight", "text/projection", "E D -> D E"),
        Rule("text_model.head.bias", "text/projection_bias", "E -> E"),
        Rule("vision_model.embeddings.patch_embedding.bias", "image/patch_embed/bias", "D -> D"),
        *(rule.inside("vision_model.head", "image/map_pool") for rule in MAP_POOL),
    ),
}

# Names of tensors that are no weights: 0, 1, 2 … in older files.
IGNORED = r"(text|vision)_model\.embeddings\.position_ids"


def is_folder(path: Path) -> bool:
    """Returns whether the folder has a config.json of Hugging Face's."""
    try:
        config = read_json(path / CONFIG)
    except UserError:
        return False
    return isinstance(config, dict) and "model_type" in config


def read(path: Path, dtype: DType | None = None) -> Bundle:
    """Returns the model in a folder of Hugging Face's; floats in `dtype`, or where that is None as they are.

    Raises:
        UserError: not such a folder, files that are missing, values that are wrong or that no model here has, or
            tensors that are not those of the config; all of them.
    """
    (family, architecture), preprocess, (tokenize, tokenizer), (tensors, file) = all_of(
        lambda: _config(path, lambda config: (family_of(config), architecture_of(config))),
        lambda: _preprocess(path),
        lambda: tokenizer_files.read(path, "none"),
        lambda: _read_first(path, WEIGHTS),
    )
    architecture = dataclasses.replace(architecture, preprocess=preprocess, tokenize=tokenize)
    weights = {name: x for name, x in tensors.items() if not re.fullmatch(IGNORED, name)}
    shapes = flatten(Definition(architecture).shapes())
    try:
        arrays = import_tensors(RULES[family.model_type], weights, shapes, dtype)
    except UserError as error:
        raise UserError(f"{path}: {CONFIG} and {file.name} disagree: {error}") from error
    return Bundle(architecture, arrays, variant_of(architecture, path.name), str(path), tokenizer)


def write(path: Path, bundle: Bundle) -> None:
    """Writes the model as a folder that `from_pretrained` of `transformers` opens, in the bundle's dtypes.

    One that is there already is replaced, other files in it stay.

    Raises:
        UserError: what the format cannot hold, all of it; a folder that holds anything else, or cannot be written.
    """
    architecture = bundle.architecture
    try:
        config, preprocessor, tokenizer = all_of(
            lambda: config_of(architecture),
            lambda: to_huggingface(architecture.preprocess, architecture.image.image_size),
            lambda: tokenizer_files.files(bundle, "huggingface"),
        )
    except UserError as error:
        raise UserError(f"{bundle.variant}: {error}") from error
    config["torch_dtype"] = str(_widest(bundle.arrays))
    texts = {CONFIG: _json(config), PREPROCESSOR: _json(preprocessor)} | tokenizer
    _write_folder(path, texts, export_tensors(RULES[config["model_type"]], bundle.arrays))


def _config(path: Path, understand: Callable[[Any], Any]) -> Any:
    """Returns what a function makes of a folder's config.json; the file is named in its error."""
    config = read_json(path / CONFIG)
    try:
        return understand(config)
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}") from error


def _preprocess(path: Path) -> Preprocess:
    """Returns what the image processor's config says; where there are two, the processor's has the last word."""
    both = read_json(path / PROCESSOR) if (path / PROCESSOR).is_file() else {}
    config = both.get("image_processor") if isinstance(both, dict) else both
    if config is None:
        config = read_json(path / PREPROCESSOR)
    if not isinstance(config, dict):
        raise UserError(f"{path}: {PREPROCESSOR} says {reprlib.repr(config)}, and should be an object")
    return from_huggingface(config, _config(path, image_size_of))


def _widest(arrays: Mapping[str, np.ndarray]) -> np.dtype:
    """Returns the dtype that holds all floats: `transformers` gives a model only one."""
    dtypes = {x.dtype for x in arrays.values() if jnp.issubdtype(x.dtype, np.floating)}
    return functools.reduce(jnp.promote_types, dtypes)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def _read_first(folder: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], Path]:
    """Returns the tensors of the first of the files that is there, and the file; of an index, those of its pieces."""
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no weights: no {', no '.join(names)}")
    if file.suffix != ".json":
        return _read_one(file), file
    pieces = sorted(set(read_json(file)["weight_map"].values()))
    if absent := [name for name in pieces if not (folder / name).is_file()]:
        raise UserError(f"{file}: of its {len(pieces)} pieces some are missing: {listed(absent)}")
    return {name: x for piece in pieces for name, x in _read_one(folder / piece).items()}, file


def _read_one(file: Path) -> dict[str, np.ndarray]:
    return read_safetensors(file) if file.suffix == ".safetensors" else archive.read(file)


def _write_folder(path: Path, texts: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a folder whose config is the first of the texts, and whose weights are called `TENSORS`."""
    config = next(iter(texts))
    if path.exists() and not (path.is_dir() and (is_folder(path) or not any(path.iterdir()))):
        raise UserError(f"{path} holds something other than a model in this format; choose another folder")
    with contextlib.ExitStack() as stack:
        for name, text in texts.items():
            stack.enter_context(whole(path / name)).write_text(text, encoding="utf-8")
        file = stack.enter_context(whole(path / TENSORS))
        in_order = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in tensors.items()}
        safetensors.numpy.save_file(in_order, file, metadata={"format": "pt"})
        (path / config).unlink(missing_ok=True)
