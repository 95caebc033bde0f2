"""OpenCLIP's folders are read whole and written back bit for bit; what is not understood or held is refused by name."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import open_clip_models
import pytest
from oracles import open_clip as peer
from oracles import require, timm

from clip_jax.architecture import Architecture, Preprocess, ResNetTower, TextTower, Tokenize, ViTTower
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.variants import CLIPA_PREPROCESS, OPEN_CLIP, SIGLIP, SIGLIP_PREPROCESS, VARIANTS
from clip_jax.weights import archive, open_clip, preprocess_files
from clip_jax.weights import timm as our_timm
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import export_tensors, flatten, source_shapes

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


OF_TIMM = ("ViT-SO400M-14-SigLIP-384", "ViT-SO400M-16-SigLIP-i18n-256", "ViT-B-32-SigLIP2-256")


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


# The names for another resolution or activation have as many parameters, but for a few positions.
ANOTHER = re.compile(r".*(-\d{3}|-quickgelu)")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if ANOTHER.fullmatch(name) else ()) for name in PEERS]
)
def test_a_name_has_as_many_parameters_as_in_open_clip(name):
    count = sum(parameter.numel() for parameter in without_memory(name).parameters())
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(Definition(PEERS[name]).shapes().params)) == count


@pytest.mark.parametrize("name", ["RN50x4-gelu", "ViT-g-14", "ViT-L-14-CLIPA", *OF_TIMM])
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
            ["image.patch_bias=False for True", "image.activation="],
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


def save(folder: Path, model: Any, config: dict[str, Any], preprocess: Preprocess, file: str) -> Path:
    """Writes a model of OpenCLIP's as a folder of its own; the file's name says its format."""
    torch = require("torch")
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": preprocess_files.to_open_clip(preprocess)}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    if file.endswith("safetensors"):
        require("safetensors.torch").save_file(model.state_dict(), folder / file)
    else:
        torch.save(model.state_dict(), folder / file)
    return folder


def state_of(model: Any) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in model.state_dict().items()}


def with_openais_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"text_cfg": config["text_cfg"] | {"hf_tokenizer_name": None, "tokenizer_kwargs": {}}}


def with_custom_text(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of the same model with its text tower under `text.`, and temperatures as vectors."""
    return config | {"custom_text": True, "nonscalar_logit_scale": True, "init_logit_bias": -5}


CASES = {
    "ViT-B-32-quickgelu": (VARIANTS["ViT-B-32"].preprocess, with_openais_tokenizer, "open_clip_pytorch_model.bin"),
    "RN50": (VARIANTS["RN50"].preprocess, with_openais_tokenizer, "open_clip_model.safetensors"),
    "ViT-L-14-CLIPA": (CLIPA_PREPROCESS, with_openais_tokenizer, "pytorch_model.pth"),
    "ViT-g-14": (VARIANTS["ViT-g-14"].preprocess, with_custom_text, "model.safetensors"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_written_and_opened_by_open_clip_bit_for_bit(name, tmp_path):
    preprocess, change, file = CASES[name]
    config = change(open_clip_models.narrowed(name))
    size = config["vision_cfg"]["image_size"]
    noise = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    model = open_clip_models.random_model(config, noise=noise)
    found = open_clip.read(save(tmp_path / "theirs", model, config, preprocess, file))
    assert found.architecture.preprocess == preprocess
    assert (found.variant, found.origin, found.tokenizer) == ("theirs", str(tmp_path / "theirs"), None)

    open_clip.write(tmp_path / "ours", found)
    loaded, _, _ = peer().create_model_and_transforms(f"local-dir:{tmp_path / 'ours'}")
    plain = {key.removeprefix("text."): x.reshape(()) if x.size == 1 else x for key, x in state_of(model).items()}
    assert_same({key.removeprefix("text."): x for key, x in state_of(loaded).items()}, plain)
    inputs = open_clip_models.inputs(found.architecture, images=2)
    outputs = (open_clip_models.run(it.eval(), *inputs) for it in (loaded, model))
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.visual.preprocess_cfg["resize_mode"] == preprocess.resize
    assert loaded.visual.preprocess_cfg["interpolation"] == preprocess.interpolation

    again = open_clip.read(tmp_path / "ours")
    assert again.architecture == found.architecture
    assert_same(again.arrays, found.arrays)


@pytest.mark.parametrize("name", NARROW)
def test_open_clip_opens_what_is_written_of_every_kind_of_model(name, tmp_path):
    bundle = bundle_of(NARROW[name])
    open_clip.write(tmp_path / "folder", bundle)
    loaded, _, _ = peer().create_model_and_transforms(f"local-dir:{tmp_path / 'folder'}")
    assert_same(state_of(loaded), export_tensors(open_clip.rules_of(NARROW[name], custom_text=False), bundle.arrays))


@pytest.mark.full
def test_a_siglip_is_written_and_opened_by_open_clip_bit_for_bit(tmp_path):
    config = with_openais_tokenizer(open_clip_models.narrowed("ViT-B-16-SigLIP2"))
    model = open_clip_models.random_model(config, timm_depth=12)
    found = open_clip.read(save(tmp_path / "theirs", model, config, SIGLIP_PREPROCESS, "open_clip_model.safetensors"))
    open_clip.write(tmp_path / "ours", found)
    loaded, _, _ = peer().create_model_and_transforms(f"local-dir:{tmp_path / 'ours'}")
    assert_same(state_of(loaded), state_of(model))
    inputs = open_clip_models.inputs(found.architecture, images=2)
    outputs = (open_clip_models.run(it.eval(), *inputs) for it in (loaded, model))
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_tensors_of_a_siglip_go_in_and_out_bit_for_bit(tmp_path):
    config = open_clip_models.narrowed("ViT-B-16-SigLIP")
    model = open_clip_models.random_model(config, timm_depth=2)
    architecture = open_clip.architecture_of({"model_cfg": config})
    architecture = dataclasses.replace(architecture, image=dataclasses.replace(architecture.image, depth=2))
    require("torch").save(model.state_dict(), tmp_path / "model.pt")
    found = open_clip.read_state_dict(tmp_path / "model.pt", architecture)
    assert_same(export_tensors(open_clip.rules_of(architecture, custom_text=True), found.arrays), state_of(model))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ViT", np.float16),
        ("ViT", ml_dtypes.bfloat16),
        ("ViT", np.float32),
        ("ResNet", np.float16),
        ("last", ml_dtypes.bfloat16),
        ("eos", np.float32),
    ],
)
def test_arrays_keep_their_bits_and_dtypes_on_the_way_through_a_folder(name, dtype, tmp_path):
    bundle = bundle_of(NARROW[name], dtype)
    open_clip.write(tmp_path / "folder", bundle)
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == [open_clip.CONFIG, open_clip.TENSORS]
    found = open_clip.read(tmp_path / "folder")
    assert found.architecture == NARROW[name]
    assert_same(found.arrays, bundle.arrays)
    floats = [x.dtype for x in open_clip.read(tmp_path / "folder", np.float32).arrays.values() if x.dtype != np.int32]
    assert set(floats) == {np.dtype(np.float32)}


def test_a_named_model_is_found_to_be_it(tmp_path):
    open_clip.write(tmp_path / "folder", bundle_of(VARIANTS["ViT-W64/4@16px"]))
    assert open_clip.read(tmp_path / "folder").variant == "ViT-W64/4@16px"
    assert open_clip.is_folder(tmp_path / "folder")
    assert not open_clip.is_folder(tmp_path)
    assert not open_clip.is_folder(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("clean", ["lower", "canonicalize"])
def test_open_clip_makes_the_same_tokens_of_a_folder_with_openais_tokenizer(clean, tmp_path):
    architecture = dataclasses.replace(VARIANTS["ViT-W64/4@16px"], tokenize=Tokenize(clean=clean))
    open_clip.write(tmp_path / "folder", bundle_of(architecture))
    tokenizer = peer().get_tokenizer(f"local-dir:{tmp_path / 'folder'}")
    texts = ["A photo,  of a dog!", "x" * 100, ""]
    ids = tokenizer(texts).numpy()
    assert ids.shape == (3, 16)
    plain = peer().SimpleTokenizer(context_length=16, clean=clean)
    np.testing.assert_array_equal(ids, plain(texts).numpy())
    assert open_clip.read(tmp_path / "folder").architecture.tokenize.clean == clean


TOKENIZER = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "dog": 5}


def bert(folder: Path) -> Path:
    """Writes a small tokenizer as `bert-base-uncased` has it."""
    require("transformers")
    from transformers import BertTokenizer

    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(TOKENIZER))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_tokenizer_of_a_folders_own_comes_with_the_model_and_its_separator_is_blanked_where_the_config_says(tmp_path):
    folder = bert(tmp_path / "folder")
    open_clip.write(tmp_path / "other", bundle_of(NARROW["last"]))
    config = json.loads((tmp_path / "other" / open_clip.CONFIG).read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "bert-base-uncased"}
    config["model_cfg"]["text_cfg"] |= {"tokenizer_kwargs": {"strip_sep_token": True}}
    (folder / open_clip.CONFIG).write_text(json.dumps(config))
    (tmp_path / "other" / open_clip.TENSORS).rename(folder / open_clip.TENSORS)
    found = open_clip.read(folder)
    tokenize = found.architecture.tokenize
    assert (tokenize.kind, tokenize.clean, tokenize.pad_id, tokenize.blank_id) == ("file", "whitespace", 0, 3)
    assert {"a", "dog"} < json.loads(found.tokenizer)["model"]["vocab"].keys()

    open_clip.write(tmp_path / "ours", found)
    again = open_clip.read(tmp_path / "ours")
    assert (again.architecture, again.tokenizer) == (found.architecture, found.tokenizer)
    theirs, ours = (peer().get_tokenizer(f"local-dir:{path}") for path in (folder, tmp_path / "ours"))
    assert theirs(["A  dog"]).tolist() == ours(["A  dog"]).tolist() == [[2, 4, 5] + [0] * 9]


# --- files that are not as they should be ---


def folder_of(path: Path, name: str = "ViT", changes: dict[str, Any] | None = None) -> Path:
    """Writes a folder whose config is changed after the weights were written."""
    open_clip.write(path, bundle_of(NARROW[name]))
    config = json.loads((path / open_clip.CONFIG).read_text())
    for where, value in (changes or {}).items():
        part, _, key = where.rpartition(".")
        (config["model_cfg"][part] if part else config["model_cfg"])[key] = value
    (path / open_clip.CONFIG).write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"text_cfg.layers": 3}, ["missing (12): transformer.resblocks.2.ln_1.weight"]),
        ({"text_cfg.layers": 1}, ["not known (12): transformer.resblocks.1."]),
        (
            {"vision_cfg.mlp_ratio": 2.0},
            ["visual.transformer.resblocks.0.mlp.c_fc.weight is float32 [100, 48]", "[96, 48]"],
        ),
        ({"init_logit_bias": -10}, ["missing (1): logit_bias"]),
        ({"vision_cfg.no_ln_pre": True}, ["not known (2): visual.ln_pre."]),
        ({"text_cfg.proj_bias": True}, ["missing (2): text_projection.weight, text_projection.bias", "not known (1)"]),
        (
            {"embed_dim": 8, "vision_cfg.image_size": 32, "text_cfg.layers": 3},
            [
                "missing (12)",
                "text_projection is float32 [32, 24], not float [32, 8]",
                "visual.positional_embedding is",
            ],
        ),
    ],
    ids=lambda words: str(words)[:50],
)
def test_a_config_and_weights_that_disagree_are_refused_with_all_that_differs(changes, reasons, tmp_path):
    folder = folder_of(tmp_path / "folder", changes=changes)
    with pytest.raises(UserError) as error:
        open_clip.read(folder)
    for words in (*reasons, str(folder / open_clip.CONFIG), str(folder / open_clip.TENSORS)):
        assert words in str(error.value)


def test_a_folder_without_weights_and_tokenizer_is_refused_for_both(tmp_path):
    folder = folder_of(tmp_path / "folder", changes={"text_cfg.hf_tokenizer_name": "timm/ViT-B-16-SigLIP"})
    (folder / open_clip.TENSORS).rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError,
        match=r"no tokenizer.*names 'timm/ViT-B-16-SigLIP'.*; .* has no weights: none of open_clip_model\.saf",
    ):
        open_clip.read(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_cfg": 3}'])
def test_a_config_that_says_nothing_is_refused_by_its_path(content, tmp_path):
    (tmp_path / open_clip.CONFIG).write_text(content)
    with pytest.raises(UserError) as error:
        open_clip.read(tmp_path)
    assert str(tmp_path / open_clip.CONFIG) in str(error.value)


def test_the_weights_that_are_read_are_those_that_open_clip_would_take(tmp_path):
    folder = folder_of(tmp_path / "folder")
    for file in open_clip.WEIGHTS[1:]:
        (folder / file).write_bytes(b"nothing")
    assert open_clip.read(folder).architecture == NARROW["ViT"]
    names = list(open_clip.WEIGHTS)
    while names:
        chosen = peer().factory._find_checkpoint_in_dir(folder)
        assert Path(chosen).name == names[0]
        (folder / names.pop(0)).unlink()


# --- lone state dicts ---


def tensors_of(name: str, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns a model's tensors by OpenCLIP's names, with the text tower at the root or under `text.`."""
    rules = open_clip.rules_of(NARROW[name], custom_text=bool(prefix))
    return dict(export_tensors(rules, bundle_of(NARROW[name]).arrays))


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("file", ["model.pt", "model.bin", "model.safetensors"])
def test_a_lone_state_dict_is_read_as_the_architecture_that_is_told(file, prefix, tmp_path):
    tensors = tensors_of("last", prefix)
    tensors |= {"logit_scale": tensors["logit_scale"].reshape(1), "logit_bias": tensors["logit_bias"].reshape(1)}
    if file.endswith("safetensors"):
        require("safetensors.numpy").save_file(
            {key: np.asarray(x, order="C") for key, x in tensors.items()}, tmp_path / file
        )
    else:
        masks = {f"{prefix}attn_mask": np.zeros((12, 12), np.float32)}
        archive.write(tmp_path / file, tensors | masks)
    found = open_clip.read_state_dict(tmp_path / file, NARROW["last"])
    assert (found.architecture, found.variant, found.origin) == (NARROW["last"], "model", str(tmp_path / file))
    assert_same(found.arrays, bundle_of(NARROW["last"]).arrays)


def test_a_state_dict_of_another_model_is_refused_with_all_that_differs(tmp_path):
    archive.write(tmp_path / "model.pt", tensors_of("ResNet"))
    with pytest.raises(
        UserError, match=r"model\.pt: .*missing .*visual\.class_embedding.*; not known .*visual\.bn1"
    ) as error:
        open_clip.read_state_dict(tmp_path / "model.pt", NARROW["ViT"])
    assert "\n" not in str(error.value)


# --- the activation that OpenAI's weights were trained with ---


def as_openais(name: str, path: Path) -> Path:
    """Writes a model as OpenAI does: with three numbers among the tensors."""
    architecture = NARROW[name]
    numbers = {
        "input_resolution": architecture.image.image_size,
        "context_length": architecture.text.context_length,
        "vocab_size": architecture.text.vocab_size,
    }
    tensors = tensors_of(name) | {key: np.array(n, np.int64) for key, n in numbers.items()}
    archive.write(path, tensors)
    return path


def gelu(architecture: Architecture) -> Architecture:
    towers = {"text": dataclasses.replace(architecture.text, activation="gelu")}
    if isinstance(architecture.image, ViTTower):
        towers["image"] = dataclasses.replace(architecture.image, activation="gelu")
    return dataclasses.replace(architecture, **towers)


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_openais_weights_are_not_computed_with_another_gelu_and_the_error_says_what_would_happen(name, tmp_path):
    path = as_openais(name, tmp_path / "model.pt")
    with pytest.raises(UserError) as error:
        open_clip.read_state_dict(path, gelu(NARROW[name]))
    for words in (
        f"{path}: these weights are OpenAI's (context_length, input_resolution, vocab_size are among them)",
        "trained with QuickGELU; computed with another GELU ('gelu') they lose several points of accuracy",
        "say activation='quick_gelu'",
    ):
        assert words in str(error.value)
    assert_same(open_clip.read_state_dict(path, NARROW[name]).arrays, bundle_of(NARROW[name]).arrays)


def test_the_error_names_a_variant_that_has_quickgelu_where_there_is_one(tmp_path):
    path = as_openais("ViT", tmp_path / "model.pt")
    with pytest.raises(UserError, match="activation='quick_gelu' or variant='ViT-B/32'"):
        open_clip.read_state_dict(path, VARIANTS["ViT-B-32"])


def test_a_folder_with_openais_weights_whose_config_says_gelu_is_refused(tmp_path):
    folder = folder_of(tmp_path / "folder", changes={"quick_gelu": False})
    (folder / open_clip.TENSORS).unlink()
    as_openais("ViT", folder / "open_clip_pytorch_model.bin")
    with pytest.raises(
        UserError, match=r'QuickGELU; .* write "quick_gelu": true into the model_cfg of .*open_clip_config'
    ):
        open_clip.read(folder)
