"""What `open_clip_config.json` says, as an architecture, and back.

What OpenCLIP would build and is not computed here is refused, and so is what a config cannot say; all of it in one
error. Which keys there are is in clip_jax/weights/open_clip_keys.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from clip_jax.architecture import Architecture, ImageTower, Preprocess, ResNetTower, TextTower, Tokenize, ViTTower
from clip_jax.checked import leaves
from clip_jax.errors import UserError
from clip_jax.models.clip import SIGLIP_BIAS_INIT
from clip_jax.weights import preprocess_files, timm
from clip_jax.weights.open_clip_keys import (
    CLEANING,
    CLIP_TOKENIZER,
    EPS,
    FILE_TOKENIZER,
    MODEL,
    POOLS,
    TEXT,
    VISION,
    Key,
    shown,
    understood,
)

# OpenCLIP takes the tokenizer of the folder that a config is in, whatever the name is, unless the folder is a
# repository of the hub: then this stands in the error that says there is no such repository.
TOKENIZER_NAME = "name-of-the-repository-that-this-folder-becomes"


def architecture_of(config: Any) -> Architecture:
    """Returns what OpenCLIP would build for the content of an `open_clip_config.json`.

    Of a tokenizer that is in files it says how texts are cleaned; the rest of `tokenize` is in the files.

    Raises:
        UserError: keys that are not known, values that make no model, or one that is not computed here; all of them.
    """
    problems: list[str] = []
    parts = _parts(config, problems)
    if not problems:
        try:
            return Architecture(**parts)
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"not a model that can be computed here: {'; '.join(problems)}")


def blanks_separator(config: Any) -> bool:
    """Returns whether the tokenizer's separator becomes 0, of a config that has an architecture."""
    return (config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}).get("strip_sep_token", False)


def config_of(architecture: Architecture) -> dict[str, Any]:
    """Returns the content of an `open_clip_config.json` that says this architecture.

    How an image's mode is changed and where half a pixel goes each family's code decides: OpenCLIP has no words for it.

    Raises:
        UserError: what the format cannot hold, all of it, with what its reader would take it for.
    """
    image, text = architecture.image, architecture.text
    model: dict[str, Any] = {"embed_dim": architecture.embed_dim}
    towers = (text,) if isinstance(image, ResNetTower) or is_timm(image) else (image, text)  # whose activation it says
    if quick_gelu := any(tower.activation == "quick_gelu" for tower in towers):
        model["quick_gelu"] = True
    if architecture.logit_bias:
        model["init_logit_bias"] = SIGLIP_BIAS_INIT
    if is_timm(image):
        model["custom_text"] = True
    model["vision_cfg"] = _vision_cfg(image, quick_gelu)
    model["text_cfg"] = _text_cfg(text, architecture.tokenize, quick_gelu)
    config = {"model_cfg": model, "preprocess_cfg": preprocess_files.to_open_clip(architecture.preprocess)}
    if lost := _lost(architecture, config):
        raise UserError(
            f"OpenCLIP's format cannot hold this model; its reader would take {'; '.join(lost)}"
            f"{_timm_hint(image)}; choose another format"
        )
    return config


def is_timm(tower: ImageTower) -> bool:
    """Returns whether OpenCLIP has towers of this kind from timm."""
    return isinstance(tower, ViTTower) and tower.pool == "map"


# --- reading ---


def _parts(config: Any, problems: list[str]) -> dict[str, Any]:
    """Returns an architecture's fields; what is wrong with a config goes to the problems."""
    config = config if type(config) is dict else {}
    preprocess = config.get("preprocess_cfg") or {}
    if type(preprocess) is not dict:
        problems.append(f"preprocess_cfg={shown(preprocess)} should be an object")
        preprocess = {}
    model = understood(config.get("model_cfg"), "model_cfg", MODEL, problems)
    if model["embed_dim"] is None:
        problems.append("model_cfg.embed_dim is missing")
    vision = understood(model["vision_cfg"], "vision_cfg", VISION, problems)
    text = understood(model["text_cfg"], "text_cfg", TEXT, problems)

    def built(build: Callable, *arguments: Any) -> Any:
        try:
            return build(*arguments)
        except UserError as error:
            problems.append(str(error))

    return {
        "embed_dim": model["embed_dim"],
        "image": built(_image_tower, vision, model["quick_gelu"]),
        "text": built(_text_tower, text, model["quick_gelu"]),
        "preprocess": built(preprocess_files.from_open_clip, preprocess),
        "tokenize": _tokenize(text, problems),
        "logit_bias": model["init_logit_bias"] is not None,
    }


def _chosen(quick_gelu: bool, activation: str | None, at: str) -> str:
    """Returns the activation that two settings choose together."""
    if quick_gelu and activation:
        raise UserError(f"{at}.act_kwargs do not go with quick_gelu=True")
    return "quick_gelu" if quick_gelu else activation or "gelu"


def _image_tower(vision: dict[str, Any], quick_gelu: bool) -> ImageTower:
    size, width = vision["image_size"], vision["width"]
    if vision["timm_model_name"]:
        return _timm_tower(vision)
    if isinstance(vision["layers"], tuple):
        return ResNetTower(size, width, vision["layers"], 32 * width // vision["head_width"])
    if vision["patch_size"] is None:
        raise UserError("vision_cfg.patch_size=None goes with a ResNet, whose layers are four numbers")
    return ViTTower(
        image_size=size,
        patch_size=vision["patch_size"],
        width=width,
        depth=vision["layers"],
        num_heads=width // vision["head_width"],
        mlp_dim=int(width * vision["mlp_ratio"]),
        activation=_chosen(quick_gelu, vision["act_kwargs"], "vision_cfg"),
        eps=vision["norm_kwargs"],
        pool=POOLS[vision["pool_type"]],
        pre_norm=not vision["no_ln_pre"],
        # the state of one position is the same whether it is taken before the norm or behind it
        norm_after_pool=vision["final_ln_after_pool"] and vision["pool_type"] == "avg",
    )


def _timm_tower(vision: dict[str, Any]) -> ViTTower:
    name = vision["timm_model_name"]
    if type(name) is not str or name not in timm.TOWERS:
        raise UserError(
            f"vision_cfg.timm_model_name={shown(name)} is none of the timm towers that are computed here: "
            f"{', '.join(timm.TOWERS)}"
        )
    tower = timm.TOWERS[name]
    must = {"timm_pool": "map", "timm_proj": "none", "image_size": tower.image_size}
    if wrong := [f"{key}={vision[key]!r}, not {value!r}" for key, value in must.items() if vision[key] != value]:
        raise UserError(f"{name} is computed with other settings here: vision_cfg.{', vision_cfg.'.join(wrong)}")
    return tower


def _text_tower(text: dict[str, Any], quick_gelu: bool) -> TextTower:
    return TextTower(
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        width=text["width"],
        depth=text["layers"],
        num_heads=text["heads"],
        mlp_dim=int(text["width"] * text["mlp_ratio"]),
        activation=_chosen(quick_gelu, text["act_kwargs"], "text_cfg"),
        eps=text["norm_kwargs"],
        causal=not text["no_causal_mask"],
        pool=text["pool_type"],
        eos_id=text["eos_id"] if text["pool_type"] == "eos" else None,
        projection=text["proj_type"] != "none",
        projection_bias=text["proj_bias"] and text["proj_type"] != "none",
    )


def _tokenize(text: dict[str, Any], problems: list[str]) -> Tokenize:
    kind, keys = ("file", FILE_TOKENIZER) if text["hf_tokenizer_name"] else ("clip", CLIP_TOKENIZER)
    says = understood(text["tokenizer_kwargs"] or {}, "text_cfg.tokenizer_kwargs", keys, problems)
    return Tokenize(kind, clean=says["clean"])


# --- writing ---


def _vision_cfg(tower: ImageTower, quick_gelu: bool) -> dict[str, Any]:
    if is_timm(tower):
        name = timm.nearest_tower(tower)
        return {
            "image_size": timm.TOWERS[name].image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
    if isinstance(tower, ResNetTower):
        sizes = {"image_size": tower.image_size, "layers": list(tower.depths), "width": tower.width, "patch_size": None}
        return sizes | _said(VISION, {"head_width": 32 * tower.width // tower.num_heads})
    sizes = {"image_size": tower.image_size, "layers": tower.depth, "width": tower.width}
    flags = {
        "head_width": tower.width // tower.num_heads,
        "mlp_ratio": _ratio(tower),
        "no_ln_pre": not tower.pre_norm,
        "pool_type": "avg" if tower.pool == "mean" else "tok",
        "final_ln_after_pool": tower.norm_after_pool,
        **_kwargs(tower, quick_gelu),
    }
    return sizes | {"patch_size": tower.patch_size} | _said(VISION, flags)


def _text_cfg(tower: TextTower, tokenize: Tokenize, quick_gelu: bool) -> dict[str, Any]:
    sizes = {
        "context_length": tower.context_length,
        "vocab_size": tower.vocab_size,
        "width": tower.width,
        "heads": tower.num_heads,
        "layers": tower.depth,
    }
    in_files = tokenize.kind == "file"
    kwargs = {"clean": tokenize.clean} if tokenize.clean in CLEANING else {}
    if in_files:
        kwargs["strip_sep_token"] = tokenize.blank_id is not None
    flags = {
        "mlp_ratio": _ratio(tower),
        "no_causal_mask": not tower.causal,
        "pool_type": tower.pool,
        "proj_type": "linear" if tower.projection else "none",
        "proj_bias": tower.projection_bias,
        **_kwargs(tower, quick_gelu),
        "hf_tokenizer_name": TOKENIZER_NAME if in_files else None,
        "tokenizer_kwargs": _said(FILE_TOKENIZER if in_files else CLIP_TOKENIZER, kwargs) or None,
    }
    eos = {"eos_id": tower.eos_id} if tower.pool == "eos" else {}
    return sizes | _said(TEXT, flags) | eos


def _kwargs(tower: ViTTower | TextTower, quick_gelu: bool) -> dict[str, Any]:
    return {
        "act_kwargs": {"approximate": "tanh"} if tower.activation == "gelu_tanh" and not quick_gelu else None,
        "norm_kwargs": {"eps": tower.eps} if tower.eps != EPS else None,
    }


def _said(keys: Mapping[str, Key], values: dict[str, Any]) -> dict[str, Any]:
    """Returns what has to be said: a default has not."""
    return {name: value for name, value in values.items() if value != keys[name].default}


def _ratio(tower: ViTTower | TextTower) -> float:
    """Returns the number by which OpenCLIP multiplies the width, rounding down, to get the MLP's."""
    ratio = tower.mlp_dim / tower.width
    return ratio if int(tower.width * ratio) == tower.mlp_dim else math.nextafter(ratio, math.inf)


def _lost(architecture: Architecture, config: dict[str, Any]) -> list[str]:
    """Returns what a reader of the config would take for something else, with both values."""
    problems: list[str] = []
    seen = _parts(config, problems)
    tokenize, preprocess = architecture.tokenize, architecture.preprocess
    meant = {field.name: getattr(architecture, field.name) for field in dataclasses.fields(architecture)} | {
        "tokenize": Tokenize(tokenize.kind, clean=_habit(tokenize)),
        "preprocess": dataclasses.replace(preprocess, rgb_first=Preprocess.rgb_first, crop_floor=Preprocess.crop_floor),
    }
    return problems + [line for name, part in meant.items() for line in _differences(name, seen[name], part)]


def _habit(tokenize: Tokenize) -> str:
    """Returns how OpenCLIP cleans texts for a tokenizer in files: at least it mends mojibake and joins white space."""
    return "whitespace" if tokenize.kind == "file" and tokenize.clean == "none" else tokenize.clean


def _differences(name: str, seen: Any, meant: Any) -> list[str]:
    if seen is None:  # then there is a problem
        return []
    if not dataclasses.is_dataclass(meant):
        return [] if seen == meant else [f"{name}={seen!r} for {meant!r}"]
    values = {where: value for where, _, value in leaves(seen, f"{name}.")}
    return [
        f"{where}={values[where]!r} for {value!r}"
        for where, _, value in leaves(meant, f"{name}.")
        if values[where] != value
    ]


def _timm_hint(tower: ImageTower) -> str:
    """Returns what more there is to say about a tower that timm has not."""
    if not is_timm(tower) or tower in timm.TOWERS.values():
        return ""
    name = timm.nearest_tower(tower)
    activation = timm.TOWERS[name].activation
    hint = f". With an attention pool it has timm's towers alone, of which {name} is the nearest"
    if dataclasses.replace(tower, activation=activation) in timm.TOWERS.values():
        as_there = ", as Hugging Face does for all of SigLIP" if tower.activation == "gelu_tanh" else ""
        hint += (
            f": that computes {activation!r}, and this model {tower.activation!r}{as_there}; with activation="
            f"{activation} when it is read it can be written, and computes numbers that differ a little"
        )
    return hint
