"""A run that starts from weights that are there: anybody's, in another size, whole or with adapters, and out again."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from oracles import open_clip, openai_clip, transformers
from processes import finish, free_port, start
from test_conversions import RESNET, TEXT, drawn
from test_conversions import VIT as NARROW
from tiny_tokenizers import EOS, PAD, WORDS, few_words

import clip_jax
from clip_jax import pretrained
from clip_jax.architecture import Architecture, Lora, TextTower, Tokenize, ViTTower
from clip_jax.checked import build
from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from clip_jax.errors import UserError
from clip_jax.models import variants
from clip_jax.models.clip import Definition
from clip_jax.models.transformer import Compute
from clip_jax.optim.parameters import is_adapter
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.loop import train
from clip_jax.training.program import Program, assemble
from clip_jax.training.step_lines import read_lines
from clip_jax.weights import openai, tensors
from clip_jax.weights.bundle import Bundle, write_folder
from clip_jax.weights.mapping import flatten
from clip_jax.workdir import Workdir

FORMATS = {"openai": openai_clip, "open_clip": open_clip, "huggingface": transformers}
# Two heads in both towers, so that a tensor axis can split them.
VIT = dataclasses.replace(NARROW, text=dataclasses.replace(TEXT, width=128, num_heads=2, mlp_dim=512))
ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A file of OpenAI's format, in float16 what it has in float16."""
    path = tmp_path_factory.mktemp("openai") / "vit.pt"
    openai.write(path, drawn(VIT))
    return path


def config(data_dir: Path, source: Path | str, **changes) -> Config:
    """Returns a run of three steps from some weights; `changes` by dotted path."""
    run = Config(
        model=ModelConfig(variant=None),
        data=DataConfig(data_dir=str(data_dir), global_batch=16),
        optim=OptimConfig(learning_rate=1e-3, warmup="1 step"),
        init_from=str(source),
        duration="3 steps",
        log_every=1,
        checkpoint_every=1,
        keep_checkpoints=3,
    )
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        setattr(getattr(run, section) if section else run, name, value)
    return run


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(file, data_dir, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config(data_dir, file), workdir, devices=ONE)
    return workdir


# --- in ---


def program_of(config: Config) -> tuple[Program, Bundle]:
    """Returns what a new run is, and the weights that it starts from."""
    weights = pretrained.initial(config)
    devices = jax.devices() if config.mesh.fsdp > 1 else ONE
    return assemble(config, devices, records=100, arch=weights.architecture), weights


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_run_begins_with_the_weights_bit_for_bit_in_their_places_on_the_mesh(sizes, file, data_dir):
    program, weights = program_of(config(data_dir, file, mesh=MeshConfig(*sizes)))
    state = program.initial_state(weights.arrays)
    expected = pretrained.read(file).arrays
    found = flatten(state.weights)
    assert found.keys() == expected.keys()
    for path, x in found.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, np.float32(expected[path]), err_msg=path)
    for x, like in zip(*map(jax.tree.leaves, (state, program.state)), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (like.shape, like.dtype, like.sharding)
    assert state.step == 0
    assert not any(x.any() for x in jax.tree.leaves(state.optimizer))


def test_whatever_load_takes_is_where_a_run_can_start(file, run, data_dir, tmp_path):
    sources = {"openai": file, "a run": run}
    for name in ("open_clip", "huggingface", "clip_jax"):
        sources[name] = tmp_path / name
        pretrained.convert(file, name, sources[name])
    for name, source in sources.items():
        found = pretrained.initial(config(data_dir, source)).arrays
        for path, x in pretrained.read(source).arrays.items():
            assert found[path].dtype == np.float32
            np.testing.assert_array_equal(found[path], np.float32(x), err_msg=f"{name}: {path}")


def test_images_and_captions_of_another_size_resize_the_positions_as_load_does(file, data_dir):
    changes = {"model__image_size": 48, "model__context_length": 20}
    program, weights = program_of(config(data_dir, file, **changes))
    assert (program.batch.image.shape, program.batch.tokens.shape) == ((16, 48, 48, 3), (16, 20))
    found = flatten(program.initial_state(weights.arrays).weights)
    expected = pretrained.read(file, pretrained.Asked(image_size=48, context_length=20), dtype=np.float32).arrays
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    assert found["image/positional_embedding"].shape == (10, 128)


def test_the_variant_is_the_weights_own_name_unless_the_config_has_one(file, data_dir, monkeypatch):
    assert program_of(config(data_dir, file))[0].variant == str(file)
    monkeypatch.setitem(variants.VARIANTS, "small", VIT)
    assert program_of(config(data_dir, file))[0].variant == "small"
    program, _ = program_of(config(data_dir, file, model__variant="small", model__image_size=48))
    assert (program.variant, program.architecture.image.image_size) == ("small", 48)


def test_weights_are_told_apart_by_their_architecture_and_small_arrays_and_large_ones_are_not_read(file, run, tmp_path):
    shutil.copy(file, tmp_path / "same.pt")
    found = [pretrained.read(source, dtype=np.float32) for source in (file, tmp_path / "same.pt", run)]
    resized = pretrained.read(file, pretrained.Asked(context_length=20), dtype=np.float32)
    one, same, trained, other = (bundle.fingerprint() for bundle in (*found, resized))
    assert one == same
    assert len({one, trained, other}) == 3
    arrays = dict(found[0].arrays)
    arrays["text/token_embedding"] = np.broadcast_to(np.float32(0), arrays["text/token_embedding"].shape)
    assert dataclasses.replace(found[0], arrays=arrays).fingerprint() == one


# --- through ---


def test_a_runs_folder_says_what_it_is_without_the_weights_it_came_from(run, file):
    folder = Workdir(run)
    assert folder.architecture() == VIT
    assert folder.variant() == str(file)
    assert folder.config().init_from == str(file)
    assert clip_jax.load(run)[0].architecture == VIT


@pytest.mark.full
def test_a_resumed_run_reads_its_checkpoint_and_not_the_weights_it_started_from(file, data_dir, tmp_path, run):
    again = config(data_dir, tmp_path / "gone.pt")
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    content["config"]["init_from"] = again.init_from  # as if it had been there, and was moved since
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    train(again, tmp_path / "run", devices=ONE)
    assert losses(tmp_path / "run") == losses(run)
    for path, x in pretrained.read(run).arrays.items():
        np.testing.assert_array_equal(pretrained.read(tmp_path / "run").arrays[path], x)


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_from_the_weights_again(file, data_dir, tmp_path):
    gone = config(data_dir, tmp_path / "gone.pt")
    Workdir(tmp_path / "run").claim(gone, VIT)
    with pytest.raises(UserError, match=r"init_from='.*gone\.pt': .* is no file"):
        train(gone, tmp_path / "run", devices=ONE)
    other = dataclasses.replace(VIT, embed_dim=16)
    openai.write(tmp_path / "gone.pt", drawn(other))
    with pytest.raises(UserError, match=r"architecture of .*gone\.pt: .*embed_dim=32.* -> .*embed_dim=16"):
        train(gone, tmp_path / "run", devices=ONE)


def test_a_runs_folder_keeps_the_kernel_by_which_the_weights_it_came_from_are_resized(
    run, file, data_dir, tmp_path, monkeypatch
):
    pretrained.convert(file, "huggingface", tmp_path / "theirs")
    folder = Workdir(shutil.copytree(run, tmp_path / "run"))
    before = json.loads(folder.config_file.read_text())
    assert before["resize_kernel"] == "bicubic_antialias"
    for claimed in ("bicubic", None):  # when it begins, and when it goes on
        folder.claim(folder.config(), VIT, variant=folder.variant(), resize_kernel=claimed)
        found = pretrained.read(folder.path, pretrained.Asked(image_size=48))
        expected = pretrained.read(tmp_path / "theirs", pretrained.Asked(image_size=48))
        assert found.resize_kernel == expected.resize_kernel == "bicubic"
    del before["resize_kernel"]  # as older runs
    folder.config_file.write_text(json.dumps(before))
    assert pretrained.read(folder.path).resize_kernel == "bicubic_antialias"
    folder.config_file.write_text(json.dumps(before | {"resize_kernel": "cubic"}))
    with pytest.raises(UserError, match="resize_kernel='cubic' is not one of bicubic_antialias, bicubic"):
        pretrained.read(folder.path)

    class Claimed(Exception):
        """What the folder is told."""

    def claim(*_, **told) -> None:
        raise Claimed(told)

    monkeypatch.setattr(Workdir, "claim", claim)
    with pytest.raises(Claimed) as claimed:
        train(config(data_dir, tmp_path / "theirs"), tmp_path / "new", devices=ONE)
    assert claimed.value.args[0]["resize_kernel"] == "bicubic"


@pytest.mark.full
def test_a_tokenizer_comes_with_the_weights_and_stays_with_the_run(data_dir, tmp_path):
    small = Architecture(
        embed_dim=8,
        image=ViTTower(16, 8, width=8, depth=1, num_heads=1, mlp_dim=8),
        text=TextTower(8, len(WORDS), width=8, depth=1, num_heads=1, mlp_dim=8, pool="eos", eos_id=EOS),
        tokenize=Tokenize("file", clean="lower", pad_id=PAD),
    )
    write_folder(tmp_path / "model", dataclasses.replace(drawn(small), tokenizer=few_words()))
    train(config(data_dir, tmp_path / "model", duration="2 steps"), tmp_path / "run", devices=ONE)
    shutil.rmtree(tmp_path / "model")
    assert Workdir(tmp_path / "run").tokenizer() == few_words()
    assert clip_jax.load(tmp_path / "run")[0].tokenize(["a dog"]).shape == (1, 8)
    train(config(data_dir, tmp_path / "run", duration="2 steps"), tmp_path / "second", devices=ONE)
    (tmp_path / "other.json").write_text(few_words().replace('"dog"', '"fox"'))
    with pytest.raises(UserError, match=r"other\.json' is not the tokenizer of init_from's weights; leave it out"):
        train(
            config(data_dir, tmp_path / "run", model__tokenizer=str(tmp_path / "other.json")),
            tmp_path / "third",
            devices=ONE,
        )
    assert not (tmp_path / "third").exists()


# --- out ---


@pytest.mark.parametrize("target_format", FORMATS)
def test_what_was_fine_tuned_goes_to_every_format_with_our_logits(target_format, run, file, tmp_path, capsys):
    FORMATS[target_format]()
    assert pretrained.convert(run, target_format, tmp_path / "target", check=True), capsys.readouterr().out
    trained = pretrained.read(run).arrays
    changed = [path for path, x in pretrained.read(file).arrays.items() if not np.array_equal(x, trained[path])]
    assert len(changed) == len(trained)


def begun(architecture: Architecture) -> Bundle:
    """Returns weights as OpenAI's training begins, matrices in float16; gains and biases a little moved."""
    random = np.random.default_rng(0)

    def draw(path: str, x: jax.Array) -> np.ndarray:
        if path.endswith(("kernel", "projection")):
            return np.asarray(x, np.float16)
        moved = path.endswith(("scale", "bias"))
        return np.asarray(x + 0.1 * random.normal(size=x.shape) if moved else x, np.float32)

    arrays = flatten(jax.device_get(Definition(architecture).init(jax.random.key(0))))
    return Bundle(architecture, {path: draw(path, x) for path, x in arrays.items()}, "random", "random")


@pytest.mark.full
@pytest.mark.parametrize("frozen", [None, "image/.*"])
def test_a_vit_b32_of_openais_is_fine_tuned_for_3_steps_and_goes_to_every_format(frozen, data_dir, tmp_path):
    openai.write(tmp_path / "b32.pt", begun(variants.VARIANTS["ViT-B/32"]))
    changes = {"model__variant": "ViT-B/32", "optim__learning_rate": 1e-5, "data__global_batch": 8}
    changes |= {"optim__frozen": frozen}
    train(config(data_dir, tmp_path / "b32.pt", **changes, checkpoint_every=3), tmp_path / "run", devices=ONE)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for target_format, oracle in FORMATS.items():
        oracle()
        assert pretrained.convert(tmp_path / "run", target_format, tmp_path / target_format, check=True)
    source, trained = pretrained.read(tmp_path / "b32.pt"), pretrained.read(tmp_path / "run")
    assert trained.variant == "ViT-B/32"
    for path, x in trained.arrays.items():
        same = x.tobytes() == np.float32(source.arrays[path]).tobytes()
        assert same == (frozen is not None and path.startswith("image/")), path


def test_a_frozen_tower_is_the_same_tensors_bit_for_bit_in_what_is_written(file, data_dir, tmp_path):
    train(config(data_dir, file, optim__frozen="image/.*"), tmp_path / "run", devices=ONE)
    pretrained.convert(tmp_path / "run", "openai", tmp_path / "target.pt")
    source, target = (tensors.read_file(path) for path in (file, tmp_path / "target.pt"))
    for name, x in source.items():
        if name.startswith("visual."):
            assert np.float32(x).tobytes() == target[name].tobytes(), name
        elif name not in openai.NUMBERS:
            assert not np.array_equal(np.float32(x), target[name]), name


@pytest.mark.full
def test_two_processes_start_from_the_same_weights_and_refuse_two(file, run, data_dir, tmp_path):
    def ends_of(*sources: Path) -> list[tuple[int, str, str]]:
        fields = {
            "model.variant": "none",
            "data.global_batch": 16,
            "data.data_dir": data_dir,
            "data.crop_scale": (0.9, 1),
        }
        fields |= {"optim.learning_rate": 1e-3, "optim.warmup": "1 step", "optim.weight_decay": 0.2}
        fields |= {"optim.clip_norm": "none", "duration": "3 steps", "log_every": 1, "mesh.fsdp": 2}
        same = ["train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run", "--num_processes=2"]
        same += [f"--config.{name}={value}" for name, value in fields.items()]
        same += [f"--coordinator=127.0.0.1:{free_port()}"]
        own = [[f"--process_id={i}", f"--config.init_from={source}"] for i, source in enumerate(sources)]
        return finish([start([*same, *arguments], JAX_NUM_CPU_DEVICES="2") for arguments in own])

    (tmp_path / "mine").mkdir()
    shutil.copy(file, tmp_path / "mine" / "vit.pt")
    for code, _, said in ends_of(file, tmp_path / "mine" / "vit.pt"):
        assert code == 2
        assert "do not agree on the config (process 0 and 1)" in said, said
    shutil.copytree(run, tmp_path / "a run")  # which all of them read, each to its own devices
    for source in (file, tmp_path / "a run"):
        ends = ends_of(source, source)
        assert [code for code, *_ in ends] == [0, 0], ends
        if source == file:
            for (_, expected), (_, found) in zip(losses(run), losses(tmp_path / "run"), strict=True):
                assert found == pytest.approx(expected, rel=1e-5)
        shutil.rmtree(tmp_path / "run")


# --- adapters ---


@pytest.fixture(scope="module")
def adapted(file, data_dir, tmp_path_factory) -> Path:
    """The folder of a run with adapters, at another resolution, on eight devices."""
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    changes = {"model__lora_rank": 4, "model__lora_alpha": 8.0, "model__image_size": 48}
    train(config(data_dir, file, **changes, mesh=MeshConfig(2, 2, 2)), workdir)
    return workdir


def last_weights(workdir: Path, lora: Lora) -> dict[str, np.ndarray]:
    """Returns the arrays of the last checkpoint as they were trained."""
    device = jax.sharding.SingleDeviceSharding(ONE[0])
    shapes = Definition(Workdir(workdir).architecture(), Compute(lora=lora)).shapes()
    places = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return flatten(jax.device_get(checkpoints.restore_weights(checkpoints.latest(), places)))


def test_a_run_with_adapters_is_loaded_with_them_merged_and_needs_nothing_of_its_config(adapted, tmp_path):
    content = json.loads((adapted / "config.json").read_text())
    assert content["lora"] == {"rank": 4, "alpha": 8.0}
    shutil.copytree(adapted, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(content | {"config": "of another version"}))
    found, trained = pretrained.read(tmp_path / "run"), last_weights(adapted, Lora(4, 8.0))
    assert found.architecture == variants.resized(VIT, 48)
    assert found.arrays.keys() == flatten(Definition(found.architecture).shapes()).keys()
    for module in ("attention/qkv", "attention/out", "mlp/up", "mlp/down"):
        kernel, a, b = (trained[f"text/blocks/{module}/{name}"] for name in ("kernel", "lora_a", "lora_b"))
        for i in range(len(kernel)):  # written out, for the second tower and each matrix
            if module == "attention/qkv":
                more = np.stack([np.tensordot(a[i][:, t], b[i][t], 1) for t in range(3)], axis=1)
            else:
                more = np.tensordot(a[i], b[i], 1)
            merged = found.arrays[f"text/blocks/{module}/kernel"][i]
            assert np.abs(b[i]).max() > 0
            np.testing.assert_allclose(merged, kernel[i] + 2 * more, rtol=0, atol=1e-6)
    model, preprocess = clip_jax.load(adapted)
    assert preprocess.architecture.image.image_size == 48
    assert np.isfinite(model.encode_text(model.tokenize(["a dog"]))).all()


@pytest.mark.parametrize("target_format", FORMATS)
def test_adapters_are_merged_in_what_is_written_for_others(target_format, adapted, tmp_path, capsys):
    FORMATS[target_format]()
    assert pretrained.convert(adapted, target_format, tmp_path / "target", check=True), capsys.readouterr().out


@pytest.mark.full
def test_adapters_give_the_losses_of_one_device_on_eight(adapted, file, data_dir, tmp_path):
    changes = {"model__lora_rank": 4, "model__lora_alpha": 8.0, "model__image_size": 48}
    train(config(data_dir, file, **changes), tmp_path, devices=ONE)
    for (_, expected), (_, found) in zip(losses(tmp_path), losses(adapted), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_with_adapters_leaves_all_else_as_it_was_bit_for_bit(adapted, file):
    base = pretrained.read(file, pretrained.Asked(image_size=48), dtype=np.float32).arrays
    for path, x in last_weights(adapted, Lora(4, 8.0)).items():
        if is_adapter(path):
            assert x.any(), path
        else:
            assert x.tobytes() == base[path].tobytes(), path


# --- what does not fit ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model__variant": "ViT-B/32"},
            r"is no ViT-B/32: embed_dim is 32, not 512; image\.depth is 3, not 12; image\.image_size is 32, not 224; "
            r"image\.mlp_dim is 512, not 3072; image\.num_heads is 2, not 12; image\.patch_size is 16, not 32; "
            r"image\.width is 128, not 768; text\.depth is 2, not 12; text\.mlp_dim is 512, not 2048; text\.num_heads "
            r"is 2, not 8; text\.width is 128, not 512\. Position embeddings are resized .*--config\.model\.image_size",
        ),
        ({"model__variant": "ViT-B-32"}, r"image\.activation is 'quick_gelu', not 'gelu'.*QuickGELU"),
        ({"model__variant": "RN50"}, r"image\.kind is 'vit', not 'resnet'"),
        ({"model__variant": "ViT-B/31"}, "unknown model variant 'ViT-B/31'"),
        ({"model__logit_bias": True}, r"is no such model: logit_bias is False, not True"),
        ({"model__variant": "ViT-B/32", "model__logit_bias": True}, r"embed_dim .* logit_bias is False, not True"),
        ({"model__image_size": 50}, r"image_size=50 .*patch_size=16.* 48 and 64"),
        ({"model__context_length": 2}, r"context_length=2 has no room"),
        ({"model__tokenizer": "tokenizer.json"}, r"the model has CLIP's own tokenizer; leave it out"),
        ({"model__lora_rank": 128}, r"model\.lora_rank=128: .*the text tower is 128 wide"),
        ({"init_from": "ViT-B/23"}, r"init_from='ViT-B/23': 'ViT-B/23' is no file, no folder"),
        ({"init_from": ""}, r"init_from='': the name of a model is empty"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_with_all_that_differs(changes, words, file, data_dir, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        train(config(data_dir, file, **changes), tmp_path / "run", devices=ONE)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_resnet_takes_no_adapters_and_drops_no_patches(data_dir, tmp_path):
    openai.write(tmp_path / "rn.pt", drawn(RESNET))
    for changes, words in (
        ({"model__lora_rank": 4}, r"model\.lora_rank=4: .* a ResNet has none"),
        ({"model__patch_dropout": 0.5}, r"model\.patch_dropout=0\.5: a ResNet has no patches"),
    ):
        with pytest.raises(UserError, match=words):
            train(config(data_dir, tmp_path / "rn.pt", **changes), tmp_path / "run", devices=ONE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": None}, r"model\.variant=None is for a run whose init_from says"),
        ({"init_from": None, "model": {"lora_rank": 4}}, r"model\.lora_rank=4 trains adapters .* set init_from"),
        ({"model": {"lora_rank": 0}}, r"model\.lora_rank=0 must be at least 1"),
        ({"model": {"lora_rank": 2, "lora_alpha": 0.0}}, r"model\.lora_alpha=0\.0 must be positive"),
        ({"model": {"lora_rank": 2, "lora_alpha": float("nan")}}, r"model\.lora_alpha=nan must be positive"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes, words):
    model = {"variant": "ViT-B/32"} if "model" in changes else {"variant": None}
    values = {"init_from": "ViT-B/32"} | changes | {"model": model | changes.get("model", {})}
    with pytest.raises(UserError, match=words):
        build(Config, values)


def test_a_folder_of_a_run_from_other_weights_is_refused(run, data_dir, tmp_path):
    with pytest.raises(UserError, match=r"belongs to another config \(init_from: '.*vit\.pt' -> '.*other\.pt'\)"):
        train(config(data_dir, tmp_path / "other.pt"), run, devices=ONE)


def test_the_planner_needs_the_variants_name_because_it_reads_no_weights(data_dir):
    with pytest.raises(UserError, match=r"model\.variant=None .* not read here: set model\.variant"):
        assemble(config(data_dir, "ViT-B/32"), ONE, records=100)
    named = config(data_dir, "ViT-B/32", model__variant="ViT-B/32", model__lora_rank=8)
    said = assemble(named, ONE, records=100).described()
    assert "adapters: rank 8, scale 2" in said
    assert "trained: 2,211,840 of 153,489,153 parameters" in said
