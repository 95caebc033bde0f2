"""The dataclasses of a run: built from plain values, every rule checked, every message about its field and value."""

import copy
import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from clip_jax.architecture import Architecture
from clip_jax.checked import build, leaves
from clip_jax.config import (
    FREE_ON_RESUME,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    differences,
)
from clip_jax.errors import UserError
from clip_jax.models.variants import VARIANTS, architecture
from clip_jax.workdir import Workdir

CONFIG_FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


LONG = Config(duration="10_000 steps")


def with_value(path: str, value) -> dict:
    """Returns a config as plain values, with one field changed."""
    values = dataclasses.asdict(LONG)
    *parents, name = path.split(".")
    node = values
    for parent in parents:
        node = node[parent]
    node[name] = value
    return values


def test_the_defaults_are_a_run():
    assert Config() == Config()


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.stem)
def test_every_config_builds_from_its_own_json_and_names_an_architecture(file):
    config = runpy.run_path(str(file))["get_config"]()
    assert build(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert architecture(config.model)
    assert config.data.train is None or config.data.train.startswith("tfds:")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_architecture_survives_json(name):
    assert build(Architecture, json.loads(json.dumps(dataclasses.asdict(VARIANTS[name])))) == VARIANTS[name]


def test_build_puts_right_what_json_blurs_and_nothing_else():
    built = build(Config, with_value("data.crop_scale", [0.5, 1]))
    assert built.data.crop_scale == (0.5, 1.0)
    assert [type(x) for x in built.data.crop_scale] == [float, float]
    assert isinstance(build(Config, with_value("optim.learning_rate", 1)).optim.learning_rate, float)
    assert build(Config, with_value("optim.clip_norm", 1)).optim.clip_norm == 1.0


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("log_every", 1e3, "int"),
        ("log_every", "10", "int"),
        ("log_every", True, "int"),
        ("duration", 10, "str"),
        ("optim.b1", "0.9", "float"),
        ("optim.b1", False, "float"),
        ("optim.b1", None, "float"),
        ("model.variant", 32, "str"),
        ("model.image_size", 224.0, "int"),
        ("data.crop_scale", 0.5, r"tuple\[float, float\]"),
        ("data.crop_scale", (0.5,), r"tuple\[float, float\]"),
        ("data.crop_scale", (0.5, "1"), "float"),
        ("optim", 3, "OptimConfig"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_path_value_and_type(path, value, expected):
    name, _, rest = path.partition(".")
    with pytest.raises(UserError, match=rf"{name}.{rest}.*should be {expected}" if rest else rf"{name}=.*{expected}"):
        build(Config, with_value(path, value))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("image", 7, r"image=7 should be an object whose kind is vit or resnet"),
        ("image", ["vit"], r"image=\['vit'\] should be an object"),
        ("image", None, "image=None should be an object"),
        ("image.kind", ["x"], r"image\.kind=\['x'\]; there are: resnet, vit"),
        ("image.kind", {}, r"image\.kind={}; there are"),
        ("image.kind", "vits", r"image\.kind='vits'; did you mean 'vit'"),
        ("preprocess.mean", [10**400, 0, 0], r"preprocess\.mean\[0\]=1000.*\.\.\..* should be float"),
        ("text.width", [[0] * 99] * 99, r"text\.width=\[\[0, .{,300} should be int"),
    ],
)
def test_odd_values_of_an_architecture_are_refused_in_a_short_line(path, value, words):
    values = node = dataclasses.asdict(VARIANTS["ViT-B/32"])
    *parents, name = path.split(".")
    for parent in parents:
        node = node[parent]
    node[name] = value
    with pytest.raises(UserError, match=words) as error:
        build(Architecture, values)
    assert len(str(error.value)) < 400


def test_an_unknown_field_is_refused_with_the_nearest_and_missing_ones_are_defaults_or_listed():
    with pytest.raises(UserError, match=r"'optim\.learning_rat'.*'optim\.learning_rate'"):
        build(Config, with_value("optim.learning_rat", 1.0))
    values = dataclasses.asdict(LONG)
    del values["optim"]["b1"], values["optim"]["eps"]
    assert build(Config, values) == LONG, "an older run's config.json lacks the fields that are newer"
    values = dataclasses.asdict(VARIANTS["ViT-B/32"])
    del values["embed_dim"], values["text"]
    with pytest.raises(UserError, match="missing fields: embed_dim, text"):
        build(Architecture, values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        '{"architecture": {}}',
        '{"config": 3, "architecture": 3}',
        '{"config": {"optim": []}, "architecture": {"embed_dim": 3}}',
    ],
)
def test_a_config_json_that_is_not_ours_is_refused_by_its_path(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path)):
        Workdir(tmp_path).config()
    with pytest.raises(UserError, match=str(tmp_path)):
        Workdir(tmp_path).architecture()


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("model.compute_dtype", "int8", "not one of .*bfloat16"),
        ("model.remat", "some", "not one of .*dots"),
        ("data.global_batch", 0, "at least 1"),
        ("data.crop_scale", (0.0, 1.0), "0 < low <= high <= 1"),
        ("data.crop_scale", (0.9, 0.5), "0 < low <= high <= 1"),
        ("data.crop_scale", (0.5, 1.5), "0 < low <= high <= 1"),
        ("data.num_threads", 0, "at least 1"),
        ("data.num_workers", -1, "negative"),
        ("optim.learning_rate", 0.0, "positive"),
        ("optim.learning_rate", float("nan"), "positive and finite"),
        ("optim.learning_rate", float("inf"), "positive and finite"),
        ("optim.warmup", "-1", "no duration: write it as '5000 steps'"),
        ("optim.weight_decay", -0.1, "negative"),
        ("optim.weight_decay", float("inf"), "finite"),
        ("optim.weight_decay", float("nan"), "finite"),
        ("optim.b1", 1.0, r"\[0, 1\)"),
        ("optim.b2", -0.5, r"\[0, 1\)"),
        ("optim.eps", -1e-6, "positive"),
        ("optim.eps", float("nan"), "positive and finite"),
        ("optim.eps", float("inf"), "positive and finite"),
        ("optim.clip_norm", 0.0, "positive"),
        ("mesh.data", 0, "positive, or -1"),
        ("mesh.fsdp", -2, "positive, or -1"),
        ("mesh.tensor", -1, "only one"),
        ("seed", -1, "seed"),
        ("seed", 2**32, "seed"),
        ("duration", "0 steps", "one step at least"),
        ("duration", "3 weeks", "no duration"),
        ("log_every", 0, "at least 1"),
        ("checkpoint_every", -5, "at least 1"),
        ("keep_checkpoints", 0, "at least 1"),
        ("keep_every", 1500, "no multiple of checkpoint_every=1000, .*; the nearest that are: 1000, 2000"),
        ("keep_every", 10, "no multiple of checkpoint_every=1000, .*; the nearest that are: 1000$"),
        ("model.lora_alpha", 32.0, "without model.lora_rank there are none; set model.lora_rank, or leave"),
    ],
)
def test_a_value_that_breaks_a_rule_is_refused_with_field_value_and_rule(path, value, rule):
    with pytest.raises(UserError, match=rule) as error:
        build(Config, with_value(path, value))
    assert path.rpartition(".")[2] in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
def test_an_eps_is_refused_of_an_optimizer_that_has_none(optimizer):
    assert OptimConfig(optimizer).eps == OptimConfig.eps
    with pytest.raises(UserError, match=rf"optim\.eps=1e-08: {optimizer} has none; leave it out, .* adamw or muon"):
        OptimConfig(optimizer, eps=1e-8)


def test_a_warm_up_as_long_as_the_run_is_refused_with_the_next_move():
    values = with_value("duration", "2000 steps")
    with pytest.raises(UserError, match=r"warmup='2000 steps'.*duration='2000 steps'.*shorten the warm-up"):
        build(Config, values)


def test_rules_hold_again_when_fields_were_set_past_them():
    from clip_jax import command

    config = copy.deepcopy(LONG)
    config.data.global_batch = -8  # as a flag does
    with pytest.raises(UserError, match="-8"):
        command.checked(config)
    config.data.global_batch = 8
    assert command.checked(config) == config


def test_leaves_are_all_fields_by_their_dotted_path():
    found = {path: (hint, value) for path, hint, value in leaves(Config(seed=3, duration="10_000 steps"))}
    assert found["seed"] == (int, 3)
    assert found["model.image_size"] == (int | None, None)
    assert found["mesh.fsdp"] == (int, 1)
    parts = [ModelConfig, DataConfig, OptimConfig, LossConfig, MeshConfig, EvaluationConfig]
    assert len(found) == sum(len(dataclasses.fields(part)) for part in parts) + len(dataclasses.fields(Config)) - len(
        parts
    )


def test_differences_name_what_a_resumed_run_may_not_change():
    now = Config(seed=1, optim=OptimConfig(learning_rate=1e-3), duration="10_000 steps")
    assert differences(LONG, now) == ["optim.learning_rate: 0.0005 -> 0.001", "seed: 0 -> 1"]
    assert differences(now, now) == []


def test_what_is_free_on_resume_is_a_field_and_makes_no_difference():
    paths = {path for path, _, _ in leaves(LONG)}
    for free in FREE_ON_RESUME:
        assert any(path == free or path.startswith(f"{free}.") for path in paths)
    now = dataclasses.replace(LONG, mesh=MeshConfig(2, 2, 2), log_every=1, model=ModelConfig(remat="full"))
    assert differences(LONG, now) == []
