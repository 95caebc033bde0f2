"""OpenCLIP's folders are read whole and written back bit for bit; what is not understood or held is refused by name."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import open_clip_models
import pytest
from oracles import open_clip as peer
from oracles import require, timm

from clip_jax.architecture import Architecture, Preprocess, ResNetTower, TextTower, Tokenize, ViTTower
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.variants import CLIPA_PREPROCESS, OPEN_CLIP, SIGLIP, VARIANTS
from clip_jax.weights import open_clip, preprocess_files
from clip_jax.weights import timm as our_timm
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import flatten, source_shapes

PEERS = OPEN_CLIP | SIGLIP
TEXT = TextTower(context_length=12, vocab_size=50, width=32, depth=2, num_heads=2, mlp_dim=96)
VIT = ViTTower(image_size=20, patch_size=8, width=48, depth=2, num_heads=3, mlp_dim=100)
MAP = ViTTower(20, 8, 48, 2, 3, 100, "gelu_tanh", 1e-6, "map", False, False, patch_bias=True, projection=False)
NARROW = {
    "ViT": Architecture(24, VIT, TEXT),
    "ResNet": Architecture(24, ResNetTower(64, 16, (2, 1, 1, 1), 8), TEXT),
    "last": Architecture(
        24,
        dataclasses.replace(VIT, pool="mean", pre_norm=False, norm_after_pool=True, activation="gelu_tanh"),
        dataclasses.replace(TEXT, pool="last", causal=False, projection_bias=True, activation="gelu", eps=1e-6),
        CLIPA_PREPROCESS,
        logit_bias=True,
    ),
    "eos": Architecture(
        32, dataclasses.replace(VIT, pool="mean"), dataclasses.replace(TEXT, pool="eos", eos_id=7, projection=False)
    ),
}


def peers_name(name: str) -> str:
    """Returns what OpenCLIP calls one of our variants."""
    return name.removesuffix("-gelu")


def as_config_says(architecture: Architecture) -> Architecture:
    """Returns the architecture without what of its tokenizer stands in other files."""
    tokenize = architecture.tokenize
    return dataclasses.replace(architecture, tokenize=Tokenize(tokenize.kind, clean=tokenize.clean))


def bundle_of(architecture: Architecture, dtype: Any = np.float32, tokenizer: str | None = None) -> Bundle:
    """Returns random weights, none of them like another."""
    random = np.random.default_rng(0)
    arrays = {
        path: np.asarray(random.normal(size=x.shape)).astype(dtype)
        if x.dtype == np.float32
        else np.zeros(x.shape, x.dtype)
        for path, x in flatten(Definition(architecture).shapes()).items()
    }
    return Bundle(architecture, arrays, "mine", "a test", tokenizer)


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].tobytes() == x.tobytes(), name


# --- configs ---


@pytest.mark.parametrize("architecture", [*VARIANTS.values(), *NARROW.values()], ids=[*VARIANTS, *NARROW])
def test_a_config_that_is_written_says_the_same_architecture_when_it_is_read(architecture):
    config = json.loads(json.dumps(open_clip.config_of(architecture)))
    assert open_clip.architecture_of(config) == as_config_says(architecture)


def test_an_mlp_of_any_width_is_written_as_a_ratio_that_open_clip_rounds_to_it():
    for width in range(1, 200, 11):
        for mlp_dim in (1, width - 1, 3 * width + 1, 7 * width - 1, 5 * width + width // 3):
            text = dataclasses.replace(TEXT, width=width, num_heads=1, mlp_dim=max(mlp_dim, 1))
            config = open_clip.config_of(dataclasses.replace(NARROW["ViT"], text=text))
            assert open_clip.architecture_of(config).text == text


@pytest.mark.parametrize("name", PEERS)
def test_open_clips_own_config_of_a_name_is_the_architecture_that_has_it(name):
    config = {"model_cfg": open_clip_models.config_of(peers_name(name))}
    config["preprocess_cfg"] = preprocess_files.to_open_clip(PEERS[name].preprocess)
    assert open_clip.architecture_of(config) == as_config_says(PEERS[name])
    assert open_clip.blanks_separator(config) == (PEERS[name].tokenize.blank_id is not None)


def without_memory(name: str) -> Any:
    """Returns OpenCLIP's model of a name, all shapes and no numbers."""
    config = open_clip_models.config_of(peers_name(name))
    kind = peer().model.CustomTextCLIP if config.pop("custom_text", False) else peer().model.CLIP
    with require("torch").device("meta"):
        return kind(**config)


@pytest.mark.parametrize("name", PEERS)
def test_a_name_has_as_many_parameters_as_in_open_clip(name):
    count = sum(parameter.numel() for parameter in without_memory(name).parameters())
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(Definition(PEERS[name]).shapes().params)) == count


@pytest.mark.parametrize(
    "name",
    ["RN50x4-gelu", "ViT-g-14", "ViT-H-14-worldwide", "ViT-L-14-CLIPA"]
    + ["ViT-SO400M-14-SigLIP-384", "ViT-SO400M-16-SigLIP-i18n-256", "ViT-B-32-SigLIP2-256"],
)
def test_a_models_tensors_have_open_clips_names_and_shapes(name):
    theirs = {key: tuple(x.shape) for key, x in without_memory(name).state_dict().items()}
    rules = open_clip.rules_of(PEERS[name], custom_text="text.positional_embedding" in theirs)
    assert source_shapes(rules, flatten(Definition(PEERS[name]).shapes())) == theirs


@pytest.mark.parametrize("name", our_timm.TOWERS)
def test_a_tower_of_timms_computes_with_the_activation_the_epsilon_and_the_sizes_of_the_table(name):
    torch, tower = require("torch"), our_timm.TOWERS[name]
    with torch.device("meta"):
        trunk = timm().create_model(name, num_classes=0, global_pool="map")
    gelu = trunk.blocks[0].mlp.act
    assert tower.activation == {"GELU": "gelu", "GELUTanh": "gelu_tanh"}[type(gelu).__name__]
    assert type(trunk.attn_pool.mlp.act) is type(gelu)
    assert {module.eps for module in trunk.modules() if isinstance(module, torch.nn.LayerNorm)} == {tower.eps}
    assert trunk.patch_embed.img_size == (tower.image_size, tower.image_size)
    assert trunk.blocks[0].attn.num_heads == trunk.attn_pool.num_heads == tower.num_heads


def config_with(vision: dict | None = None, text: dict | None = None, name: str = "ViT", **model) -> dict[str, Any]:
    """Returns a config with changes; a change to None takes the key out."""
    config = copy.deepcopy(open_clip.config_of(NARROW[name]))
    for part, changes in (("vision_cfg", vision), ("text_cfg", text)):
        config["model_cfg"][part] |= changes or {}
    config["model_cfg"] |= model
    return config


@pytest.mark.parametrize(
    ("changes", "meaning"),
    [
        ({"text": {"width": 64}, "quick_gelu": False}, {"image.activation": "gelu", "text.activation": "gelu"}),
        ({"quick_gelu": False, "vision": {"act_kwargs": {"approximate": "tanh"}}}, {"image.activation": "gelu_tanh"}),
        ({"quick_gelu": False, "text": {"act_kwargs": {"approximate": "none"}}}, {"text.activation": "gelu"}),
        ({"vision": {"image_size": [24, 24]}}, {"image.image_size": 24}),
        ({"vision": {"head_width": 24}}, {"image.num_heads": 2}),
        ({"vision": {"mlp_ratio": 2.51}}, {"image.mlp_dim": 120}),
        ({"vision": {"norm_kwargs": {"eps": 1e-6}}}, {"image.eps": 1e-6}),
        ({"vision": {"pool_type": "avg"}}, {"image.pool": "mean", "image.norm_after_pool": False}),
        ({"vision": {"final_ln_after_pool": True}}, {"image.norm_after_pool": False}),
        ({"text": {"pool_type": "eos"}}, {"text.eos_id": 2}),
        ({"text": {"pool_type": "argmax", "eos_id": 5}}, {"text.eos_id": None}),
        ({"text": {"proj_type": "none", "proj_bias": True}, "embed_dim": 32}, {"text.projection_bias": False}),
        ({"init_logit_bias": -10}, {"logit_bias": True}),
        ({"init_logit_bias": None}, {"logit_bias": False}),
        ({"text": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, {"tokenize.clean": "canonicalize"}),
        ({"text": {"hf_tokenizer_name": "x"}}, {"tokenize.kind": "file", "tokenize.clean": "whitespace"}),
        ({"vision": {"patch_dropout": 0.5, "timm_drop": 0.1}, "output_dict": True, "custom_text": True}, {}),
    ],
    ids=lambda words: str(words)[:50],
)
def test_a_config_is_understood_as_open_clip_does(changes, meaning):
    architecture = open_clip.architecture_of(config_with(**changes))
    for path, value in meaning.items():
        part, _, field = path.rpartition(".")
        assert getattr(getattr(architecture, part) if part else architecture, field) == value, path


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"vision": {"ls_init_value": 1e-4}}, ["vision_cfg.ls_init_value=0.0001 is not computed here, only None"]),
        ({"vision": {"attentional_pool": True}}, ["vision_cfg.attentional_pool=True is not computed here"]),
        ({"vision": {"pool_type": "none"}}, ["vision_cfg.pool_type='none' is not computed here, only 'tok' or 'avg'"]),
        ({"vision": {"qk_norm": True}}, ["vision_cfg.qk_norm=True"]),
        ({"text": {"scale_attn": True, "scale_fc": True}}, ["text_cfg.scale_attn=True", "text_cfg.scale_fc=True"]),
        ({"text": {"embed_cls": True}}, ["text_cfg.embed_cls=True"]),
        ({"text": {"pool_type": "first"}}, ["text_cfg.pool_type='first'"]),
        ({"text": {"hf_model_name": "roberta-base"}}, ["text_cfg.hf_model_name='roberta-base'"]),
        ({"text": {"tokenizer_mode": "clips"}}, ["text_cfg.tokenizer_mode='clips'"]),
        ({"text": {"tokenizer_kwargs": {"language": "de"}}}, ["text_cfg.tokenizer_kwargs.language is not known"]),
        ({"text": {"tokenizer_kwargs": {"clean": "x"}}}, ["tokenizer_kwargs.clean='x' is not computed here, only"]),
        ({"vision": {"act_kwargs": {"approximate": "erf"}}, "quick_gelu": False}, ["vision_cfg.act_kwargs={'approx"]),
        ({"vision": {"act_kwargs": {"approximate": "tanh"}}}, ["vision_cfg.act_kwargs do not go with quick_gelu=True"]),
        ({"vision": {"norm_kwargs": {"bias": False}}}, ["vision_cfg.norm_kwargs={'bias': False} should be an object"]),
        ({"vision": {"norm_kwargs": {"eps": 0}}}, ["image tower's eps=0.0 should be between 0 and 1"]),
        ({"vision": {"width": "48"}}, ["vision_cfg.width='48' should be a whole number"]),
        ({"vision": {"width": 10**400}}, ["vision_cfg.width=1000", "… should be a whole number from 1 to"]),
        ({"vision": {"mlp_ratio": math.nan}}, ["vision_cfg.mlp_ratio=nan should be a number"]),
        ({"vision": {"image_size": [20, 24]}}, ["vision_cfg.image_size=[20, 24] should be a whole number"]),
        ({"vision": {"layers": [1, 2]}}, ["vision_cfg.layers=[1, 2] should be a whole number, or four"]),
        ({"vision": {"patch_size": None}}, ["vision_cfg.patch_size=None goes with a ResNet"]),
        ({"vision": {"colour": 1}, "text": {"colour": 2}, "colour": 3}, ["vision_cfg.colour is", "text_cfg.colour is"]),
        ({"text": {"heads": 5}}, ["text tower's width=32 is not a multiple of num_heads=5"]),
        ({"text": {"proj_type": "none"}}, ["the text tower has no projection: embed_dim=24 should be its width=32"]),
        ({"embed_dim": None}, ["model_cfg.embed_dim is missing"]),
        ({"multimodal_cfg": {"layers": 3}}, ["model_cfg.multimodal_cfg={'layers': 3} is not computed here"]),
        (
            {"vision": {"timm_model_name": "eva02_base_patch16_clip_224"}, "text": {"qk_norm": True}, "embed_dim": "x"},
            [
                "vision_cfg.timm_model_name='eva02_base_patch16_clip_224' is none of the timm towers that are computed",
                "vit_base_patch16_siglip_224, ",
                "vit_giantopt_patch16_siglip_384",
                "text_cfg.qk_norm=True",
                "model_cfg.embed_dim='x' should be a whole number",
            ],
        ),
        (
            {"vision": {"timm_model_name": "vit_base_patch16_siglip_256", "image_size": 224}},
            ["image_size=224, not 256", "vision_cfg.timm_pool='avg', not 'map'", "timm_proj='linear', not 'none'"],
        ),
    ],
    ids=lambda words: str(words)[:50],
)
def test_a_config_that_is_not_understood_is_refused_with_all_that_is_wrong(changes, reasons):
    with pytest.raises(UserError, match="not a model that can be computed here: ") as error:
        open_clip.architecture_of(config_with(**changes))
    for reason in reasons:
        assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        ([], ["model_cfg=None should be an object", "vision_cfg=None", "text_cfg=None", "embed_dim is missing"]),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": 3, "text_cfg": []}}, ["vision_cfg=3 should be", "text_cfg=[]"]),
        ({"preprocess_cfg": [1]}, ["preprocess_cfg=[1] should be an object"]),
    ],
)
def test_a_config_of_another_shape_is_refused(config, reasons):
    with pytest.raises(UserError) as error:
        open_clip.architecture_of(config)
    for reason in reasons:
        assert reason in str(error.value)


def changed(name: str, *, image: dict | None = None, text: dict | None = None, **fields) -> Architecture:
    was = NARROW[name]
    towers = {
        "image": dataclasses.replace(was.image, **(image or {})),
        "text": dataclasses.replace(was.text, **(text or {})),
    }
    return dataclasses.replace(was, **towers, **fields)


SIGLIP_TANH = dataclasses.replace(
    VARIANTS["ViT-B-16-SigLIP"], image=dataclasses.replace(VARIANTS["ViT-B-16-SigLIP"].image, activation="gelu_tanh")
)


@pytest.mark.parametrize(
    ("architecture", "reasons"),
    [
        (changed("ViT", image={"patch_bias": True}), ["image.patch_bias=False for True"]),
        (changed("ViT", image={"pool": "mean", "class_token": False}), ["image.class_token=True for False"]),
        (changed("ViT", image={"projection": False}, embed_dim=48), ["image.projection=True for False"]),
        (changed("ViT", image={"activation": "gelu"}), ["image.activation='quick_gelu' for 'gelu'; choose another"]),
        (changed("ViT", text={"activation": "gelu_tanh"}), ["text.activation='quick_gelu' for 'gelu_tanh'"]),
        (changed("ViT", tokenize=Tokenize(clean="none")), ["tokenize.clean='lower' for 'none'"]),
        (
            changed("ViT", image={"activation": "gelu", "patch_bias": True}, tokenize=Tokenize("file", clean="none")),
            ["image.patch_bias=False for True", "image.activation=", "tokenize.clean='whitespace' for 'none'"],
        ),
        (
            SIGLIP_TANH,
            [
                "image.activation='gelu' for 'gelu_tanh'",
                "vit_base_patch16_siglip_224 is the nearest: that computes 'gelu', and this model 'gelu_tanh', as "
                "Hugging Face does for all of SigLIP; with activation=gelu when it is read it can be written",
            ],
        ),
        (
            dataclasses.replace(SIGLIP_TANH, image=dataclasses.replace(SIGLIP_TANH.image, image_size=240)),
            ["image.image_size=224 for 240", "it has timm's towers alone, of which vit_base_patch16_siglip_224 is the"],
        ),
        (dataclasses.replace(NARROW["last"], embed_dim=48, image=MAP), ["image.width=768 for 48", "image.depth=12"]),
    ],
    ids=lambda x: None if isinstance(x, Architecture) else x[0],
)
def test_what_the_format_cannot_hold_is_refused_with_every_reason_and_nothing_is_written(
    architecture, reasons, tmp_path
):
    with pytest.raises(UserError, match="OpenCLIP's format cannot hold this model; its reader would take ") as error:
        open_clip.write(tmp_path / "folder", Bundle(architecture, {}, "mine", "a test"))
    for reason in reasons:
        assert reason in str(error.value)
    assert not (tmp_path / "folder").exists()


def test_where_each_family_does_things_its_own_way_the_format_takes_any():
    other = changed("ViT", preprocess=Preprocess(rgb_first=True, crop_floor=True))
    assert open_clip.config_of(other) == open_clip.config_of(NARROW["ViT"])


# --- folders ---


def save(folder: Path, model: Any, config: dict[str, Any], preprocess: Preprocess, name: str) -> Path:
    """Writes a model of OpenCLIP's as a folder of its own; a name that ends in safetensors says the format."""
    torch = require("torch")
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": preprocess_files.to_open_clip(preprocess)}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    tensors = model.state_dict()
    if name.endswith("safetensors"):
        require("safetensors.torch").save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder


def state_of(model: Any) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in model.state_dict().items()}


def as_custom_text(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of the same model with its text tower under `text.`, and temperatures as vectors."""
    return config | {"custom_text": True, "nonscalar_logit_scale": True, "init_logit_bias": -5}


CASES = {
    "ViT-B-32-quickgelu": ("ViT-B-32-quickgelu", lambda config: config, "open_clip_pytorch_model.bin"),
    "RN50": ("RN50", lambda config: config, "open_clip_model.safetensors"),
    "CLIPA": ("ViT-L-14-CLIPA", lambda config: config, "pytorch_model.pth"),
    "custom text": ("ViT-g-14", as_custom_text, "model.safetensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_written_and_opened_by_open_clip_bit_for_bit(case, tmp_path):
    name, change, file = CASES[case]
    config, preprocess = (
        change(open_clip_models.narrowed(name)),
        VARIANTS[name if name in PEERS else f"{name}-gelu"].preprocess,
    )
    config["text_cfg"].pop("hf_tokenizer_name", None)
    config["text_cfg"].pop("tokenizer_kwargs", None)
    size = config["vision_cfg"]["image_size"]
    noise = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    model = open_clip_models.random_model(config, noise=noise)
    found = open_clip.read(save(tmp_path / "theirs", model, config, preprocess, file))
    assert found.architecture.preprocess == preprocess
    assert (found.variant, found.origin, found.tokenizer) == ("theirs", str(tmp_path / "theirs"), None)

    open_clip.write(tmp_path / "ours", found)
    loaded, _, transform = peer().create_model_and_transforms(f"local-dir:{tmp_path / 'ours'}")
    plain = {key.removeprefix("text."): x.reshape(()) if x.size == 1 else x for key, x in state_of(model).items()}
    assert_same({key.removeprefix("text."): x for key, x in state_of(loaded).items()}, plain)
    inputs = open_clip_models.inputs(found.architecture, images=2)
    for ours, theirs in zip(
        open_clip_models.run(loaded.eval(), *inputs), open_clip_models.run(model, *inputs), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.visual.preprocess_cfg["resize_mode"] == preprocess.resize
    assert transform is not None

    again = open_clip.read(tmp_path / "ours")
    assert again.architecture == found.architecture
    assert_same(again.arrays, found.arrays)
