"""Hugging Face's folders: `CLIPModel` and `SiglipModel` (which fixed-resolution SigLIP 2 is, too), read and written.

FOLDER/config.json               the architecture: huggingface_config.py
FOLDER/model.safetensors         the weights, or an index and pieces of them; older folders have pytorch_model.bin
FOLDER/preprocessor_config.json  how images are prepared; newer folders may have it within processor_config.json
FOLDER/tokenizer.json …          the tokenizer
"""

import dataclasses
import functools
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from clip_jax.architecture import Preprocess
from clip_jax.errors import UserError, about, all_of
from clip_jax.files import read_json
from clip_jax.models.clip import Definition
from clip_jax.weights import folder, tokenizer_files
from clip_jax.weights.bundle import Bundle, variant_of
from clip_jax.weights.hub import COMPANIONS
from clip_jax.weights.huggingface_config import architecture_of, config_of, family_of, image_size_of
from clip_jax.weights.mapping import DType, Rule, export_tensors, flatten, import_tensors
from clip_jax.weights.modules import ATTENTION, MLP, NORM
from clip_jax.weights.preprocess_files import from_huggingface, to_huggingface
from clip_jax.weights.streaming import specs_of
from clip_jax.weights.tensors import read_first

CONFIG, TENSORS = "config.json", "model.safetensors"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# The first that is there is read, as by `transformers`.
WEIGHTS = (TENSORS, f"{TENSORS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

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
        *(rule.inside("vision_model.head.attention", "image/map_pool") for rule in ATTENTION),
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
        lambda: _said_in(path / CONFIG, lambda config: (family_of(config), architecture_of(config))),
        lambda: _preprocess(path),
        lambda: tokenizer_files.read(path, "none"),
        lambda: read_first(path, WEIGHTS),
    )
    architecture = dataclasses.replace(architecture, preprocess=preprocess, tokenize=tokenize)
    weights = {name: x for name, x in tensors.items() if not re.fullmatch(IGNORED, name)}
    shapes = flatten(Definition(architecture).shapes())
    with about(f"{path}: {CONFIG} and {file.name} disagree"):
        arrays = import_tensors(RULES[family.model_type], weights, shapes, dtype)
    variant = variant_of(architecture, path.resolve().name)
    return Bundle(architecture, arrays, variant, str(path), tokenizer, resize_kernel="bicubic")


def write(path: Path, bundle: Bundle) -> None:
    """Writes the model as a folder that `from_pretrained` of `transformers` opens, in the bundle's dtypes.

    One that is there already is replaced, other files in it stay.

    Raises:
        UserError: what the format cannot hold, all of it; a folder that holds anything else, or cannot be written.
    """
    architecture, replaces = bundle.architecture, is_folder(path)
    openclips = os.path.lexists(path / "open_clip_config.json")  # which would be read instead
    if openclips or (not replaces and os.path.lexists(path / CONFIG)):
        raise UserError(f"{path} holds something other than a model in this format; choose another folder")
    with about(bundle.variant):
        config, preprocessor, tokenizer = all_of(
            lambda: config_of(architecture),
            lambda: to_huggingface(architecture.preprocess, architecture.image.image_size),
            lambda: tokenizer_files.files(bundle, "huggingface"),
        )
    config["torch_dtype"] = str(_widest(bundle.arrays))
    files = {CONFIG: _json(config)} | dict.fromkeys(COMPANIONS) | {PREPROCESSOR: _json(preprocessor)} | tokenizer
    tensors = export_tensors(RULES[config["model_type"]], bundle.arrays)
    folder.write(path, files, TENSORS, tensors, replaces=replaces)


def _said_in(file: Path, understand: Callable[[Any], Any]) -> Any:
    """Returns what a function makes of a file of JSON; the file is named in its error."""
    content = read_json(file)
    with about(file):
        return understand(content)


def _preprocess(path: Path) -> Preprocess:
    """Returns what the image processor's config says; where there are two, the newer file has the last word."""
    within = _said_in(path / PROCESSOR, _image_processor) if (path / PROCESSOR).is_file() else None
    file = path / (PREPROCESSOR if within is None else PROCESSOR)
    config = _said_in(file, _object) if within is None else within
    family, image_size = _said_in(path / CONFIG, lambda content: (family_of(content), image_size_of(content)))
    if not config.keys() & {"image_processor_type", "feature_extractor_type"}:
        config = config | {"image_processor_type": family.processor}
    return _said_in(file, lambda _: from_huggingface(config, image_size))


def _image_processor(processor: Any) -> dict[str, Any] | None:
    """Returns what a processor_config.json says of images, None where it leaves that to another file."""
    config = _object(processor).get("image_processor")
    return None if config is None else _object(config)


def _object(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{reprlib.repr(content)} should be an object")
    return content


def _widest(arrays: Mapping[str, np.ndarray]) -> np.dtype:
    """Returns the dtype that holds all floats: `transformers` gives a model only one."""
    dtypes = {x.dtype for x in specs_of(arrays).values() if jnp.issubdtype(x.dtype, np.floating)}
    return functools.reduce(jnp.promote_types, dtypes)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"
