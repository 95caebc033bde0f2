"""Hugging Face's folders: what `transformers` writes is read, what is written it reads, all else is refused by name."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from huggingface_models import CLIP, OPENAI_LIKE, SIGLIP, bundle_of, config, inputs, random_model, run, save
from oracles import require, transformers
from safetensors.numpy import load_file, save_file

from clip_jax.architecture import Architecture, Preprocess, Tokenize
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.tokenizer import make
from clip_jax.weights import huggingface, openai
from clip_jax.weights.bundle import Bundle, write_folder
from clip_jax.weights.huggingface_config import architecture_of, config_of
from clip_jax.weights.mapping import flatten, source_shapes

SMALL = {"clip": CLIP, "siglip": SIGLIP}
DEFAULTS = {"preprocess": Preprocess(), "tokenize": Tokenize()}  # what a config.json does not say


def held() -> list[str]:
    """Returns the named architectures that Hugging Face's classes can compute."""
    return [name for name, architecture in VARIANTS.items() if not refusal(config_of, architecture)]


def refusal(function, *arguments) -> str:
    """Returns what a UserError of the function says, "" where it raises none."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def models():
    """Their models of random weights, by type."""
    return {name: random_model(architecture) for name, architecture in SMALL.items()}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> dict[str, Path]:
    """Folders as `save_pretrained` writes them."""
    return {name: save(model, SMALL[name], tmp_path_factory.mktemp(name)) for name, model in models.items()}


@pytest.fixture(params=SMALL)
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(family, saved, tmp_path) -> Path:
    """A copy of a folder, to be changed."""
    return Path(shutil.copytree(saved[family], tmp_path / "folder"))


def change(file: Path, **changes) -> None:
    """Sets keys of a file of JSON."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_zeros(architecture: Architecture) -> Bundle:
    """Returns a model whose weights are zero."""
    shapes = flatten(Definition(architecture).shapes())
    return dataclasses.replace(
        bundle_of(architecture), arrays={path: np.zeros(x.shape, x.dtype) for path, x in shapes.items()}
    )


def equal(found: Bundle, expected: Bundle) -> bool:
    arrays = {path: np.asarray(x) for path, x in expected.arrays.items()}
    return found.architecture == expected.architecture and all(
        (x.dtype, x.shape, x.tobytes()) == (arrays[path].dtype, arrays[path].shape, arrays[path].tobytes())
        for path, x in found.arrays.items()
    )


# --- config.json ---


@pytest.mark.parametrize("name", held())
def test_a_config_says_the_architecture_that_it_was_made_of(name):
    architecture = dataclasses.replace(VARIANTS[name], **DEFAULTS)
    assert architecture_of(json.loads(json.dumps(config_of(architecture)))) == architecture


@pytest.mark.parametrize("architecture", [CLIP, SIGLIP, OPENAI_LIKE])
def test_no_field_of_an_architecture_is_lost_in_a_config(architecture):
    assert architecture_of(config_of(architecture)) == dataclasses.replace(architecture, **DEFAULTS)


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "clip"},
        {"model_type": "siglip"},
        {"model_type": "clip", "text_config": None, "vision_config": {"model_type": "clip_vision_model"}},
        {"model_type": "clip", "projection_dim": 768, "text_config": {"hidden_act": "gelu", "eos_token_id": 2}},
        {"model_type": "clip", "text_config": {"eos_token_id": 2, "vocab_size": 60000}, "text_config_dict": None},
        {
            "model_type": "clip",
            "text_config": {"eos_token_id": 2, "vocab_size": 60000, "hidden_act": "quick_gelu"},
            "text_config_dict": {"hidden_act": "gelu", "num_attention_heads": 4},
            "vision_config": {"image_size": 336, "patch_size": 14},
            "vision_config_dict": {"patch_size": 16, "hidden_act": "gelu"},
        },
        {"model_type": "siglip", "text_config": {"hidden_size": 960}, "vision_config": {"hidden_size": 960}},
        {"model_type": "siglip", "text_config": {"projection_size": 1152, "hidden_size": 768}}
        | {"vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}},
    ],
)
def test_what_a_config_leaves_out_is_as_their_classes_have_it(content):
    package = transformers()
    theirs = {"clip": package.CLIPConfig, "siglip": package.SiglipConfig}[content["model_type"]](
        **copy.deepcopy(content)
    )
    assert architecture_of(content) == architecture_of(json.loads(json.dumps(theirs.to_dict())))


def test_eos_token_id_2_or_the_last_is_the_largest_id_and_any_other_is_the_first_of_it():
    def text(eos_id):
        return architecture_of({"model_type": "clip", "text_config": {"eos_token_id": eos_id}}).text

    assert (text(2).pool, text(2).eos_id) == ("argmax", None)
    assert (text(49407).pool, text(49407).eos_id) == ("argmax", None)
    assert (text(49406).pool, text(49406).eos_id) == ("eos", 49406)


def test_sizes_may_be_given_as_two_equal_numbers():
    content = {"model_type": "clip", "vision_config": {"image_size": [336, 336], "patch_size": [14, 14]}}
    assert architecture_of(content).image == dataclasses.replace(
        architecture_of({"model_type": "clip"}).image, image_size=336, patch_size=14
    )


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        ([], ["model_type=None should be 'clip' (CLIPModel) or 'siglip' (SiglipModel)"]),
        ({"model_type": "blip"}, ["model_type='blip' should be 'clip'"]),
        ({"model_type": ["clip"]}, ["model_type=['clip'] should be 'clip'"]),
        ({"model_type": "siglip2"}, ["model_type='siglip2'", "NaFlex", "google/siglip2-base-patch16-224"]),
        ({"model_type": "clip", "text_config": 3}, ["text_config=3 should be an object"]),
        ({"model_type": "clip", "projection_dim": None}, ["projection_dim=None should be int"]),
        ({"model_type": "clip", "quantization_config": {"bits": 4}}, ["its weights are quantised"]),
        (
            {"model_type": "siglip", "vision_config": {"vision_use_head": False}},
            ["vision_use_head=False should be True"],
        ),
        ({"model_type": "siglip", "text_config": {"projection_size": 512}}, ["embed_dim=512 should be its width=768"]),
        (
            {"model_type": "clip", "text_config": {"eos_token_id": [1, 2]}},
            ["text_config.eos_token_id=[1, 2] should be int"],
        ),
        ({"model_type": "clip", "text_config": {"vocab_size": 100}}, ["eos_id=49407 should be 0 to 99"]),
        (
            {
                "model_type": "clip",
                "text_config": {"hidden_act": "relu", "hidden_size": "512", "num_hidden_layers": True},
                "vision_config": {"image_size": [224, 336], "num_channels": 4, "layer_norm_eps": None},
                "projection_dim": 0.5,
            },
            [
                "text_config.hidden_act='relu' is not one of quick_gelu, gelu, gelu_pytorch_tanh",
                "text_config.hidden_size='512' should be int",
                "text_config.num_hidden_layers=True should be int",
                "vision_config.image_size=[224, 336] should be int",
                "vision_config.num_channels=4 should be 3",
                "vision_config.layer_norm_eps=None should be float",
                "projection_dim=0.5 should be int",
            ],
        ),
        (
            {
                "model_type": "clip",
                "text_config": {"num_attention_heads": 7},
                "vision_config": {"num_hidden_layers": 0},
            },
            ["text tower's width=512 is not a multiple of num_heads=7", "image tower's depth=0 should be 1 to"],
        ),
    ],
)
def test_a_config_that_is_wrong_is_refused_with_every_reason(content, reasons):
    said = refusal(architecture_of, content)
    assert [reason for reason in reasons if reason not in said] == []


# --- folders in ---


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("ViT-B/32", "ViT-bigG-14", "ViT-gopt-16-SigLIP2-384") else pytest.mark.full
        )
        for name in held()
    ],
)
def test_names_shapes_and_parameter_counts_are_those_of_their_classes(name):
    torch, package = require("torch"), transformers()
    content = config(VARIANTS[name])
    with torch.device("meta"):
        model = {"clip": package.CLIPModel, "siglip": package.SiglipModel}[content.model_type](content)
    shapes = flatten(Definition(VARIANTS[name]).shapes())
    theirs = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert source_shapes(huggingface.RULES[content.model_type], shapes) == theirs
    assert sum(x.size for x in shapes.values()) == sum(x.numel() for x in model.parameters())


def _parsed(tokenizer: str | None) -> dict | None:
    return None if tokenizer is None else json.loads(tokenizer)


def test_a_folder_of_theirs_is_read_with_all_that_it_says(saved, family):
    found = huggingface.read(saved[family])
    assert found.architecture == SMALL[family]
    assert _parsed(found.tokenizer) == _parsed(bundle_of(SMALL[family]).tokenizer)
    assert found.origin == str(saved[family])
    assert {x.dtype for x in found.arrays.values()} == {np.dtype(np.float32)}


def test_floats_come_in_the_dtype_that_is_asked_for(saved, family):
    found = huggingface.read(saved[family], ml_dtypes.bfloat16)
    assert {x.dtype for x in found.arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_a_model_in_pieces_is_the_same_model(saved, models, family, tmp_path):
    path = save(models[family], SMALL[family], tmp_path / "pieces", max_shard_size="100KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    assert equal(huggingface.read(path), huggingface.read(saved[family]))


def test_all_missing_pieces_are_named(models, family, tmp_path):
    path = save(models[family], SMALL[family], tmp_path / "pieces", max_shard_size="100KB")
    first, *_, last = sorted(path.glob("model-*.safetensors"))
    first.unlink()
    last.unlink()
    said = refusal(huggingface.read, path)
    assert first.name in said
    assert last.name in said


def test_a_file_of_pytorch_is_read_where_there_is_no_other(folder, saved, models, family):
    torch = require("torch")
    torch.save(models[family].state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert equal(huggingface.read(folder), huggingface.read(saved[family]))


def test_safetensors_come_before_a_file_of_pytorch(folder, saved, family):
    (folder / "pytorch_model.bin").write_bytes(b"nothing that could be read")
    assert equal(huggingface.read(folder), huggingface.read(saved[family]))


def test_positions_among_the_weights_of_older_files_are_passed_over(folder, saved, family):
    positions = {f"{tower}_model.embeddings.position_ids": np.arange(9)[None] for tower in ("text", "vision")}
    save_file(load_file(folder / "model.safetensors") | positions, folder / "model.safetensors")
    assert equal(huggingface.read(folder), huggingface.read(saved[family]))


def test_preprocessing_within_a_processors_config_has_the_last_word(folder, family):
    inner = json.loads((folder / "preprocessor_config.json").read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert huggingface.read(folder).architecture.preprocess.mean == (0.1, 0.2, 0.3)
    (folder / "preprocessor_config.json").unlink()
    assert huggingface.read(folder).architecture.preprocess.mean == (0.1, 0.2, 0.3)


def test_a_processors_config_may_leave_the_images_to_the_other_file(folder, saved, family):
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert equal(huggingface.read(folder), huggingface.read(saved[family]))


def test_an_image_processor_without_a_class_is_of_the_models_family(folder, family):
    size = SMALL[family].image.image_size
    sizes = {"clip": {"shortest_edge": size}, "siglip": {"height": size, "width": size}}
    content = {"size": sizes[family], "crop_size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    assert huggingface.read(folder).architecture.preprocess == SMALL[family].preprocess


@pytest.mark.parametrize(
    ("content", "its"),
    [({"model_type": "clip"}, True), ({"format": "clip_jax"}, False), ({"config": {}}, False), ([], False)],
)
def test_a_folder_is_known_by_the_model_type_in_its_config(content, its, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert huggingface.is_folder(tmp_path) == its
    assert not huggingface.is_folder(tmp_path / "nowhere")


def test_all_that_a_folder_does_not_have_is_named_at_once(tmp_path):
    said = refusal(huggingface.read, tmp_path)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"):
        assert name in said


def test_a_bad_config_and_bad_preprocessing_and_a_missing_file_are_said_at_once(folder):
    change(folder / "config.json", model_type="siglip2")
    change(folder / "preprocessor_config.json", image_mean="grey")
    (folder / "model.safetensors").unlink()
    said = refusal(huggingface.read, folder)
    assert "NaFlex" in said
    assert "model.safetensors" in said
    change(folder / "config.json", model_type="clip", vision_config={"hidden_act": "relu"})
    said = refusal(huggingface.read, folder)
    assert "config.json: vision_config.hidden_act='relu'" in said
    assert "preprocessor_config.json" in said
    assert "image_mean='grey'" in said


def test_weights_that_are_not_the_configs_are_named_with_both_files(folder, family):
    content = json.loads((folder / "config.json").read_text())
    content["vision_config"]["num_hidden_layers"] += 1
    content["text_config"]["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(content))
    tensors = load_file(folder / "model.safetensors") | {"vision_model.head.gate": np.zeros(1, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    depth, vocab = SMALL[family].image.depth, SMALL[family].text.vocab_size
    said = refusal(huggingface.read, folder)
    assert "config.json and model.safetensors disagree" in said
    assert f"vision_model.encoder.layers.{depth}.self_attn.q_proj.weight" in said
    assert f"token_embedding.weight is float32 [{vocab}, {SMALL[family].text.width}], not float [{vocab + 1}," in said
    assert "not known (1): vision_model.head.gate" in said


# --- folders out ---


def test_what_comes_back_from_their_loader_is_the_original_bit_for_bit(saved, models, family, tmp_path):
    torch, package = require("torch"), transformers()
    huggingface.write(tmp_path / "ours", huggingface.read(saved[family]))
    back = package.AutoModel.from_pretrained(tmp_path / "ours")
    original = models[family].state_dict()
    assert type(back) is type(models[family])
    assert back.state_dict().keys() == original.keys()
    assert all(
        x.dtype == original[name].dtype and torch.equal(x, original[name]) for name, x in back.state_dict().items()
    )
    both = inputs(SMALL[family])
    for found, expected in zip(run(back, *both), run(models[family], *both), strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_goes_in_and_out_bit_for_bit(dtype, models, family, tmp_path):
    torch, package = require("torch"), transformers()
    model = copy.deepcopy(models[family]).to(getattr(torch, dtype))
    huggingface.write(tmp_path / "ours", huggingface.read(save(model, SMALL[family], tmp_path / "theirs")))
    back = package.AutoModel.from_pretrained(tmp_path / "ours").state_dict()
    assert {x.dtype for x in back.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(x, back[name]) for name, x in model.state_dict().items())


def test_where_dtypes_are_mixed_the_config_names_one_that_holds_all(saved, tmp_path):
    bundle = huggingface.read(saved["clip"], np.float16)
    arrays = dict(bundle.arrays) | {"logit_scale": np.float32(2.6592)}
    huggingface.write(tmp_path / "ours", dataclasses.replace(bundle, arrays=arrays))
    back = transformers().AutoModel.from_pretrained(tmp_path / "ours")
    assert back.logit_scale.item() == np.float32(2.6592)
    assert load_file(tmp_path / "ours" / "model.safetensors")["visual_projection.weight"].dtype == np.float16


@pytest.mark.parametrize("architecture", [CLIP, SIGLIP, OPENAI_LIKE])
def test_their_processor_finds_tokenizer_and_images_in_a_folder_of_ours_and_we_in_what_it_saves(architecture, tmp_path):
    huggingface.write(tmp_path / "ours", with_zeros(architecture))
    processor = transformers().AutoProcessor.from_pretrained(tmp_path / "ours")
    text = "a photo of a cat"
    ids = processor(text=[text], padding="max_length", return_tensors="np")["input_ids"]
    processor.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "preprocessor_config.json").exists()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "ours" / name, tmp_path / "theirs" / name)
    back = huggingface.read(tmp_path / "theirs")
    assert back.architecture == architecture
    end = len(text.split()) + (2 if architecture.tokenize.kind == "clip" else 0)  # theirs goes on with EOT
    found = make(architecture.tokenize, back.tokenizer)([text], architecture.text.context_length, False)
    assert np.array_equal(found[:, :end], ids[:, :end])
    assert found.shape == ids.shape


def test_a_text_tower_with_projection_is_found_in_the_folder(saved, tmp_path):
    package = transformers()
    huggingface.write(tmp_path / "ours", huggingface.read(saved["clip"]))
    tower = package.CLIPTextModelWithProjection.from_pretrained(tmp_path / "ours")
    assert tower.text_projection.weight.shape == (CLIP.embed_dim, CLIP.text.width)


def test_what_is_written_is_read_again_and_written_alike(saved, family, tmp_path):
    bundle = huggingface.read(saved[family])
    huggingface.write(tmp_path / "once", bundle)
    again = huggingface.read(tmp_path / "once")
    huggingface.write(tmp_path / "twice", again)
    assert equal(again, bundle)
    assert again.tokenizer == bundle.tokenizer
    files = {file.name: file.read_bytes() for file in (tmp_path / "once").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "twice").iterdir()} == files


def test_openais_weights_come_back_bit_for_bit(tmp_path):
    architecture, random = dataclasses.replace(OPENAI_LIKE, **DEFAULTS), np.random.default_rng(0)
    shapes = flatten(Definition(architecture).shapes())
    dtypes = {path: np.float16 if "kernel" in path else np.float32 for path in shapes}  # as OpenAI's files
    arrays = {path: np.asarray(random.normal(size=x.shape), dtypes[path]) for path, x in shapes.items()}
    before = openai.state_dict(Bundle(architecture, arrays, "a model", "nowhere"))
    huggingface.write(tmp_path / "theirs", Bundle(architecture, arrays, "a model", "nowhere"))
    between = huggingface.read(tmp_path / "theirs")
    after = openai.state_dict(dataclasses.replace(between, architecture=architecture))
    assert dataclasses.replace(between.architecture, **DEFAULTS) == architecture
    assert after.keys() == before.keys()
    assert all((x.dtype, x.tobytes()) == (after[name].dtype, after[name].tobytes()) for name, x in before.items())


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("RN50", ["CLIPModel has no ResNet"]),
        (
            "ViT-L-14-CLIPA",
            ["image.pool='class' for 'mean'", "image.pre_norm=True for False", "text.causal=True for False"],
        ),
        ("ViT-L-14-CLIPA", ["text.pool='argmax' or 'eos' for 'last'"]),
        ("ViT-H-14-worldwide", ["text.pool='argmax' for 'eos', which is what eos_token_id=2 means to it"]),
        (
            "ViT-SO400M-16-SigLIP-i18n-256",
            ["SiglipModel cannot hold it", "text.projection=True for False", "text.projection_bias=True for False"],
        ),
    ],
)
def test_what_no_class_of_theirs_computes_is_refused_with_every_reason(name, reasons, tmp_path):
    bundle = dataclasses.replace(bundle_of(VARIANTS[name]), variant=name)
    said = refusal(huggingface.write, tmp_path / "model", bundle)
    assert said.startswith(f"{name}: Hugging Face's ")
    assert [reason for reason in reasons if reason not in said] == []
    assert not (tmp_path / "model").exists()


def test_every_other_named_architecture_can_be_written():
    assert VARIANTS.keys() - set(held()) == {
        *(name for name in VARIANTS if name.startswith("RN") or "CLIPA" in name),
        *("ViT-H-14-worldwide", "ViT-H-14-worldwide-378", "ViT-H-14-worldwide-quickgelu"),
        *("ViT-bigG-14-worldwide", "ViT-bigG-14-worldwide-378", "ViT-SO400M-16-SigLIP-i18n-256"),
    }


def test_pixels_and_towers_that_cannot_be_held_are_refused_together(tmp_path):
    architecture = dataclasses.replace(
        VARIANTS["ViT-L-14-CLIPA"], preprocess=Preprocess(resize="longest"), tokenize=Tokenize()
    )
    said = refusal(huggingface.write, tmp_path / "model", bundle_of(architecture))
    assert "image.pool='class' for 'mean'" in said
    assert "preprocess.resize='longest'" in said


def test_a_folder_of_theirs_is_replaced_and_nothing_of_the_old_model_is_read(saved, folder, family):
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": "old"}}))
    (folder / "README.md").write_text("# A model")
    bundle = huggingface.read(saved[family], np.float16)
    huggingface.write(folder, bundle)
    assert equal(huggingface.read(folder), bundle)
    assert (folder / "README.md").read_text() == "# A model"


def test_a_folder_of_something_else_stays_as_it_is(saved, tmp_path):
    bundle = huggingface.read(saved["clip"])
    write_folder(tmp_path / "ours", bundle)
    files = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("nothing")
    assert "choose another folder" in refusal(huggingface.write, tmp_path / "notes", bundle)
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["todo.txt"]
    assert "choose another folder" in refusal(huggingface.write, tmp_path / "ours", bundle)
    assert {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()} == files
