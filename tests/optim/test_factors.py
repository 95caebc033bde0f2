"""Which parameters are trained, and at which rate: against OpenCLIP's own `lock`, and every contradiction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import open_clip_models
import optimizer_oracles as oracles
import pytest
from oracles import open_clip as peer

from clip_jax import optim
from clip_jax.architecture import Lora
from clip_jax.config import Config, DataConfig, OptimConfig, Steps
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import VARIANTS
from clip_jax.optim.factors import factors_of
from clip_jax.weights import open_clip
from clip_jax.weights.mapping import export_tensors

VIT = Definition(VARIANTS["ViT-B/32"]).shapes().params
RESNET = Definition(VARIANTS["RN50"]).shapes().params


def whole(factor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the factor of each number of a parameter."""
    return np.broadcast_to(factor.reshape((*factor.shape, *(1,) * (len(shape) - factor.ndim))), shape)


# --- locked towers ---

CONFIGS = {
    "CLIP": {},
    "a text tower of its own": {"custom_text": True},
    "a projection with a bias": {"custom_text": True, "text_cfg.proj_bias": True},
    "no projection": {"custom_text": True, "text_cfg.proj_type": "none", "embed_dim": 32},
    "a mean of patches": {"vision_cfg.pool_type": "avg"},
}


def tiny(changes: dict) -> dict:
    """Returns a config of OpenCLIP's, of three blocks a tower."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 3},
    }
    for path, value in changes.items():
        *sections, name = path.split(".")
        section = config[sections[0]] if sections else config
        section[name] = value
    return config


@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers is deprecated:FutureWarning")
@pytest.mark.parametrize("case", [*CONFIGS, pytest.param("SigLIP", marks=pytest.mark.full)])
def test_locked_groups_are_open_clips(case):
    config = open_clip_models.narrowed("ViT-B-16-SigLIP") if case == "SigLIP" else tiny(CONFIGS[case])
    timm_depth = 3 if case == "SigLIP" else None
    model = open_clip_models.random_model(config, timm_depth=timm_depth)
    architecture = open_clip.architecture_of({"model_cfg": config})
    image, text = dataclasses.replace(architecture.image, depth=3), architecture.text
    architecture = dataclasses.replace(architecture, image=image)
    shapes = Definition(architecture).shapes().params
    rules = open_clip.rules_of(architecture, custom_text="custom_text" in config)
    groups = {"image": 5, "text": text.depth + 1 + text.projection}
    cases = [(None, 0), (0, None), (1, 2), (2, 1), (3, 3), (4, groups["text"]), (groups["image"], 0)]
    for lock_image, lock_text in cases:
        model.requires_grad_(True)
        if lock_image is not None:
            model.lock_image_tower(unlocked_groups=lock_image)
        if lock_text is not None:
            model.lock_text_tower(unlocked_layers=lock_text)
        factors = factors_of(OptimConfig(lock_image=lock_image, lock_text=lock_text), shapes)
        numbers = {path: whole(factors[path], x.shape) for path, x in optim.flatten(shapes).items()}
        ours = {name: set(x.ravel()) for name, x in export_tensors(rules, numbers).items()}
        assert ours == {name: {float(parameter.requires_grad)} for name, parameter in model.named_parameters()}


def test_a_resnet_is_locked_whole_as_in_open_clip():
    config = open_clip_models.narrowed("RN50")
    model = peer().model.CLIP(**config)
    with pytest.raises(AssertionError):
        model.lock_image_tower(unlocked_groups=1)
    with pytest.raises(UserError, match=r"optim.lock_image=1: a ResNet is locked whole, by 0.* optim.frozen, such as"):
        factors_of(OptimConfig(lock_image=1), RESNET)
    factors = factors_of(OptimConfig(lock_image=0), RESNET)
    assert {path.split("/")[0] for path, factor in factors.items() if factor.any()} == {"text", "logit_scale"}
    example = factors_of(OptimConfig(frozen="image/st(em|age)[123]/.*"), RESNET)
    assert {path.split("/")[1] for path, factor in example.items() if path.startswith("image/") and factor.any()} == {
        "stage4",
        "attention_pool",
    }


def test_a_tower_has_only_so_many_groups():
    assert all(factor.all() for factor in factors_of(OptimConfig(lock_image=14), VIT).values())
    with pytest.raises(UserError, match=r"optim.lock_image=15: the image tower has 14 groups; to train them all let"):
        factors_of(OptimConfig(lock_image=15), VIT)
    with pytest.raises(UserError, match=r"optim.lock_text=20: the text tower has 14 groups"):
        factors_of(OptimConfig(lock_text=20), VIT)


# --- layer-wise decay and patterns ---


def test_layers_decay_by_the_depth_of_their_own_tower():
    factors = factors_of(OptimConfig(layer_decay=0.5), RESNET)
    assert factors["image/stem1/kernel"] == 0.5**17
    assert factors["image/attention_pool/positional_embedding"] == 1
    np.testing.assert_array_equal(factors["image/stage4/rest/conv1/norm/bias"], [0.25, 0.5])
    np.testing.assert_array_equal(factors["text/blocks/mlp/up/kernel"], 0.5 ** np.arange(12, 0, -1.0))
    assert factors["text/token_embedding"] == 0.5**13
    assert factors["text/post_norm/scale"] == 0.5
    assert factors["text/projection"] == factors["logit_scale"] == 1


def test_all_factors_multiply():
    config = OptimConfig(layer_decay=0.5, lock_text=3, factors="text/.*=0.1; .*/bias = 2e0;logit_scale=.5")
    factors = factors_of(config, VIT)
    np.testing.assert_allclose(factors["text/blocks/mlp/up/bias"], [*[0] * 10, 0.25 * 0.2, 0.5 * 0.2], rtol=1e-15)
    np.testing.assert_allclose(factors["image/blocks/mlp/up/bias"], 2 * 0.5 ** np.arange(12, 0, -1.0), rtol=1e-15)
    assert factors["logit_scale"] == 0.5


def test_a_pattern_is_for_a_whole_path():
    factors = factors_of(OptimConfig(frozen="image/post_norm/.*;text/projection"), VIT)
    fixed = {path for path, factor in factors.items() if not factor.any()}
    assert fixed == {"image/post_norm/scale", "image/post_norm/bias", "text/projection"}


# --- adapters ---


def with_adapters(shapes: dict, tower: str) -> dict:
    kernel = "blocks/mlp/up"
    made = {f"{tower}/{kernel}/lora_a": (3, 40, 2), f"{tower}/{kernel}/lora_b": (3, 2, 48)}
    arrays = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in made.items()}
    return optim.join(shapes, optim.unflatten(arrays))


def test_beside_adapters_nothing_is_trained():
    shapes = with_adapters(oracles.SHAPES, "text")
    optimizer = optim.make(OptimConfig(optimizer="muon", layer_decay=0.5, lock_text=3), shapes, Steps(10, 1))
    trained, fixed = optimizer.split(shapes)
    paths = ["text/blocks/mlp/up/lora_a", "text/blocks/mlp/up/lora_b"]
    assert sorted(optim.flatten(trained)) == paths
    assert optim.flatten(fixed).keys() == optim.flatten(oracles.SHAPES).keys()
    np.testing.assert_array_equal(optimizer.factors[paths[0]], [0, 0.25, 0.5])
    assert optimizer.trained_numbers(shapes) == 2 * (40 * 2 + 2 * 48)
    assert not optimizer.trains("image")
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), trained)
    jax.jit(optimizer.update)(zeros, optimizer.init(zeros), zeros, 0)


# --- blocks without a backward pass ---


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({}, (0, 0)),
        ({"lock_image": 5, "lock_text": 3}, (8, 10)),  # the projection and the last blocks are trained
        ({"lock_image": 5, "frozen": "image/blocks/attention/.*", "layer_decay": 0.5}, (8, 0)),
        ({"lock_image": 0, "lock_text": 1}, (0, 0)),  # the whole stack is no part of what is differentiated
        ({"lock_image": 13, "lock_text": 14}, (0, 0)),  # all blocks are trained
        ({"frozen": "text/.*embedding"}, (0, 0)),
    ],
)
def test_fixed_blocks_are_those_with_nothing_trained_in_them_or_before(fields, blocks):
    optimizer = optim.make(OptimConfig(warmup="1 step", **fields), VIT, Steps(10, 1))
    assert (optimizer.fixed_blocks("image"), optimizer.fixed_blocks("text")) == blocks


def test_where_adapters_are_trained_blocks_are_fixed_only_below_the_first_of_them():
    shapes = Definition(VARIANTS["ViT-B/32"], Compute(lora=Lora(2, 2.0))).shapes().params
    for fields, blocks in (({}, 0), ({"lock_image": 4}, 9), ({"lock_image": 4, "frozen": "image/.*lora_a"}, 9)):
        assert optim.make(OptimConfig(warmup="1 step", **fields), shapes, Steps(10, 1)).fixed_blocks("image") == blocks


def test_a_resnets_fixed_blocks_are_never_counted():
    optimizer = optim.make(OptimConfig(warmup="1 step", frozen="image/stem.*"), RESNET, Steps(10, 1))
    assert optimizer.fixed_blocks("image") == 0


# --- bad input ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"frozen": "img/.*"},
            r"'img/\.\*' matches no whole path of a parameter; the nearest are: (image/\S+(, )?){3}$",
        ),
        (
            {"frozen": "image/proj"},
            r"optim.frozen: 'image/proj' matches no whole path.*; the nearest are: image/projection,",
        ),
        ({"frozen": "image/.*;text/embedding"}, "'text/embedding' matches no whole path"),
        ({"factors": "logit_bias=2"}, "optim.factors: 'logit_bias' matches no whole path.*: logit_scale,"),
        ({"factors": "image/.*=2", "lock_image": 0}, r"'image/\.\*' matches only what is not trained; leave"),
        ({"factors": "logit_scale=2", "frozen": "logit.*"}, "'logit_scale' matches only what is not trained"),
        ({"frozen": ".*"}, "nothing is left to train: by optim.frozen='.*' all there is stays"),
        (
            {"lock_image": 0, "lock_text": 0, "frozen": "logit_scale"},
            "by optim.lock_image=0, optim.lock_text=0, optim.frozen='logit_scale' all there is stays as it is; give",
        ),
        ({"lock_image": 1, "frozen": "image/projection;text/.*;logit_scale"}, "nothing is left to train"),
    ],
)
def test_what_does_not_fit_the_parameters_is_said(fields, words):
    with pytest.raises(UserError, match=words):
        optim.make(OptimConfig(**fields), VIT, Steps(10, 1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer": "adam"}, "optim.optimizer='adam' is not one of adamw, lion, adafactor, muon"),
        ({"schedule": "step"}, "optim.schedule='step' is not one of cosine, linear, rsqrt, constant"),
        ({"schedule": "rsqrt", "warmup": "0 steps"}, "optim.warmup='0 steps': the schedule rsqrt falls as fast as its"),
        (
            {"cooldown": "10 steps"},
            r"optim.cooldown='10 steps': the schedule cosine ends at 0 by itself; leave .* rsqrt",
        ),
        ({"schedule": "linear", "cooldown": "1 epoch"}, "the schedule linear ends at 0 by itself"),
        ({"cooldown": "soon"}, "optim.cooldown='soon' is no duration: write it as '5000 steps'"),
        ({"layer_decay": 0.0}, r"optim.layer_decay=0.0 must be in \(0, 1\], or None"),
        ({"layer_decay": 1.5}, r"optim.layer_decay=1.5 must be in \(0, 1\]"),
        ({"lock_image": -1}, "optim.lock_image=-1 must not be negative"),
        ({"lock_text": -2}, "optim.lock_text=-2 must not be negative"),
        ({"frozen": ""}, "optim.frozen has an empty pattern; patterns have one ';' between them"),
        ({"frozen": "image/.*;"}, "optim.frozen has an empty pattern"),
        ({"frozen": "image/("}, r"optim.frozen: 'image/\(' is no regular expression: missing \)"),
        ({"factors": "image/.*"}, r"optim.factors: 'image/\.\*' is no factor: write 'image/\.\*=0.1'"),
        ({"factors": "image/.*=fast"}, "is no factor"),
        ({"factors": "image/.*=nan"}, "is no factor"),
        ({"factors": "image/.*=-1"}, "is no factor"),
        ({"factors": "=2"}, "optim.factors has an empty pattern"),
        ({"factors": "*=2"}, r"optim.factors: '\*' is no regular expression"),
        ({"factors": "image/.*=0"}, r"optim.factors: 'image/\.\*=0' must be positive; name what .* in optim.frozen"),
        ({"factors": "a=1;a=2"}, "optim.factors: 'a' is there twice"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        OptimConfig(**fields)


@pytest.mark.parametrize(
    ("warmup", "cooldown", "words"),
    [
        ("100 steps", "0 steps", r"optim.warmup='100 steps' \(100 steps\) leaves nothing of duration='100 steps'"),
        (
            "90 examples",
            "95",
            r"'90 examples' and optim.cooldown='95' \(9 and 95 steps\) are longer than duration='100",
        ),
        ("9 steps", "200 steps", r"\(9 and 200 steps\) are longer than .*; shorten them or lengthen the run"),
    ],
)
def test_a_schedule_that_is_longer_than_the_run_is_refused(warmup, cooldown, words):
    asked = OptimConfig(schedule="constant", warmup=warmup, cooldown=cooldown)
    with pytest.raises(UserError, match=words):
        Config(data=DataConfig(global_batch=10), duration="100 steps", optim=asked)
