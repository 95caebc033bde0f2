"""Weights flow between all formats, and nothing is lost, taken for something else, or written by halves."""

import dataclasses
import itertools
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from oracles import open_clip, openai_clip, require, transformers
from PIL import Image

import clip_jax
from clip_jax import pretrained
from clip_jax.architecture import Architecture, ResNetTower, TextTower, Tokenize, ViTTower
from clip_jax.errors import UserError
from clip_jax.models import variants
from clip_jax.models.clip import Definition
from clip_jax.pretrained import Asked, convert, read
from clip_jax.weights import archive, openai, parity, timm
from clip_jax.weights.bundle import Bundle, write_folder
from clip_jax.weights.mapping import flatten

TEXT = TextTower(77, 49408, width=64, depth=2, num_heads=1, mlp_dim=256)
VIT = Architecture(32, ViTTower(32, 16, width=128, depth=3, num_heads=2, mlp_dim=512), TEXT)
RESNET = Architecture(32, ResNetTower(32, width=8, depths=(1, 2, 1, 1), num_heads=4), TEXT)
SIGLIP = Architecture(
    48,
    ViTTower(
        *(32, 16, 48, 2, 3, 96, "gelu_tanh", 1e-6),
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        projection=False,
    ),
    TextTower(16, 100, 32, 2, 2, 64, "gelu_tanh", 1e-6, causal=False, pool="last", projection_bias=True),
    variants.SIGLIP_PREPROCESS,
    Tokenize("file", clean="none", pad_id=1),
    logit_bias=True,
)
TEXTS = ["a photo of a cat", "two dogs", "a very long caption that has more words than this model has places for"]
FORMATS = {"openai": openai_clip, "open_clip": open_clip, "huggingface": transformers}


def drawn(architecture: Architecture, *, half: bool = True) -> Bundle:
    """Returns random weights, in float16 what OpenAI's files have in it, and no part of them as it starts."""
    random = np.random.default_rng(0)

    def draw(name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        around_one = name.endswith(("variance", "scale"))
        x = random.uniform(0.5, 1.5, like.shape) if around_one else 0.1 * random.normal(size=like.shape)
        matrix = name.endswith(("kernel", "projection")) or (name.endswith("bias") and "norm" not in name)
        dtype = np.float16 if half and matrix else np.float32
        return np.asarray(x).astype(np.int32 if like.dtype == np.int32 else dtype)

    shapes = flatten(Definition(architecture).shapes())
    return Bundle(architecture, {name: draw(name, like) for name, like in shapes.items()}, "small", "random")


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.pt"
    openai.write(path, drawn(VIT))
    return path


def test_from_openai_to_hugging_face_to_openclip_to_ours_and_back_is_bit_for_bit(vit, tmp_path):
    way = [vit, *(tmp_path / name for name in ("huggingface", "open_clip", "clip_jax")), tmp_path / "openai.pt"]
    for source, target in itertools.pairwise(way):
        assert convert(source, target.stem, target)
    assert way[-1].read_bytes() == vit.read_bytes()


@pytest.mark.parametrize("target_format", [*FORMATS, "clip_jax"])
@pytest.mark.parametrize("source_format", FORMATS)
def test_what_is_written_is_checked_by_the_peers_own_loader(source_format, target_format, vit, tmp_path, capsys):
    FORMATS[source_format if target_format == "clip_jax" else target_format]()
    source = vit
    if source_format != "openai":
        source = tmp_path / source_format
        convert(vit, source_format, source)
    capsys.readouterr()
    assert convert(source, target_format, tmp_path / "target", check=True), capsys.readouterr().out
    printed = capsys.readouterr().out
    for row in ("image block 2", "text block 1", "image features", "text features", "logits"):
        assert f" {row} " in printed


def test_a_resnet_goes_to_openclip_and_not_to_hugging_face(tmp_path):
    open_clip()
    openai.write(tmp_path / "rn.pt", drawn(RESNET))
    assert convert(tmp_path / "rn.pt", "open_clip", tmp_path / "open_clip", check=True)
    assert convert(tmp_path / "open_clip", "openai", tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == (tmp_path / "rn.pt").read_bytes()
    with pytest.raises(UserError, match="ResNet"):
        convert(tmp_path / "rn.pt", "huggingface", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_wrong_number_is_beyond_the_bar_of_every_peer(vit, tmp_path):
    for name, oracle in FORMATS.items():
        oracle()
        target = tmp_path / name
        pretrained.WRITERS[name](target, read(vit))
        original = read(vit)
        changed = dict(original.arrays)
        changed["text/blocks/mlp/up/bias"] = changed["text/blocks/mlp/up/bias"] + np.float16(1e-2)
        expected = parity.reference(name, target, VIT)
        rows = parity.compare(dataclasses.replace(original, arrays=changed), expected)
        wrong = {row.name for row in rows if not row.holds}
        assert wrong == {"text block 0", "text block 1", "text features", "logits"}


# --- SigLIP: a tokenizer of its own, and no mask ---


def letters() -> str:
    """Returns a tokenizer.json that knows letters and some words, and ends a text as SigLIP's does."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁cat", -1.0), ("▁photo", -1.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("siglip") / "ours"
    write_folder(path, dataclasses.replace(drawn(SIGLIP, half=False), tokenizer=letters()))
    return path


def test_a_siglip_goes_to_hugging_face_and_back_with_its_tokenizer(siglip, tmp_path):
    transformers()
    assert convert(siglip, "huggingface", tmp_path / "theirs", check=True)
    assert convert(tmp_path / "theirs", "clip_jax", tmp_path / "back", check=True)
    there, back = read(siglip), read(tmp_path / "back")
    for path, x in there.arrays.items():
        assert back.arrays[path].tobytes() == x.tobytes(), path
    ids = [
        clip_jax.load(path)[0].tokenize(TEXTS, truncate=True)
        for path in (siglip, tmp_path / "theirs", tmp_path / "back")
    ]
    end = list(ids[0][1]).index(1)
    assert 2 < end < 15
    assert (ids[0][1, end:] == 1).all(), "it is filled up with the id that ends a text"
    for found in ids[1:]:
        np.testing.assert_array_equal(found, ids[0])


def test_a_siglip_that_timm_has_a_tower_for_goes_to_openclip_and_back_with_its_tokenizer(siglip, tmp_path, monkeypatch):
    transformers()
    convert(siglip, "huggingface", tmp_path / "from")
    monkeypatch.setitem(timm.TOWERS, "vit_small_siglip_32", SIGLIP.image)
    assert convert(tmp_path / "from", "open_clip", tmp_path / "open_clip")
    assert convert(tmp_path / "open_clip", "huggingface", tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "from" / file).read_bytes()
    folders = (siglip, tmp_path / "open_clip", tmp_path / "back")
    first, *others = [clip_jax.load(path)[0].tokenize(TEXTS, truncate=True) for path in folders]
    for found in others:
        np.testing.assert_array_equal(found, first)


@pytest.mark.parametrize("target_format", ["openai", "open_clip"])
def test_a_siglip_that_a_format_cannot_hold_is_refused_with_the_reason_and_nothing_is_written(
    target_format, siglip, tmp_path
):
    words = {"openai": "logit_bias=False for True", "open_clip": "timm"}[target_format]
    with pytest.raises(UserError, match=words):
        convert(siglip, target_format, tmp_path / "target")
    assert not any(tmp_path.iterdir())


def test_a_model_that_sees_padding_takes_captions_of_its_own_length_alone(siglip):
    model, _ = clip_jax.load(siglip)
    tokens = model.tokenize(TEXTS[:2])
    assert model.encode_text(tokens).shape == (2, 48)
    with pytest.raises(UserError, match=r"\[2, 15\], not \[n, 16\]: this model sees what stands behind a caption"):
        model.encode_text(tokens[:, :15])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_and_pictures_give_the_logits_of_hugging_faces_own_pipeline(kind, vit, siglip, tmp_path):
    theirs, torch = transformers(), require("torch")
    convert({"clip": vit, "siglip": siglip}[kind], "huggingface", tmp_path / "model")
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((40, 51), (64, 33))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = theirs.AutoTokenizer.from_pretrained(tmp_path / "model")(
            TEXTS, padding="max_length", truncation=True, return_tensors="pt", max_length=16 if kind == "siglip" else 77
        )
        pixels = theirs.AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")(
            pictures, return_tensors="pt"
        )
        peer = theirs.AutoModel.from_pretrained(tmp_path / "model").float().eval()
        expected = peer(input_ids=words.input_ids, pixel_values=pixels.pixel_values).logits_per_image.numpy()
    model, preprocess = clip_jax.load(tmp_path / "model")
    found, _ = model(preprocess(pictures), model.tokenize(TEXTS, truncate=True))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- what the user wants of the weights ---


@pytest.fixture
def small_variants(monkeypatch) -> None:
    """Puts the small model into the table, with both activations."""
    towers = {"image": dataclasses.replace(VIT.image, activation="gelu")}
    gelu = dataclasses.replace(VIT, **towers, text=dataclasses.replace(TEXT, activation="gelu"))
    monkeypatch.setitem(variants.VARIANTS, "small-quickgelu", VIT)
    monkeypatch.setitem(variants.VARIANTS, "small", gelu)


def state_dict(path: Path, *, numbers: bool) -> Path:
    """Writes the tensors as `torch.save` writes a state dict, with OpenAI's three numbers or without."""
    tensors = openai.state_dict(drawn(VIT))
    archive.write(path, tensors if numbers else {k: x for k, x in tensors.items() if k not in openai.NUMBERS})
    return path


def test_a_lone_state_dict_must_be_told_its_variant(small_variants, tmp_path):
    path = state_dict(tmp_path / "plain.pt", numbers=False)
    with pytest.raises(UserError, match=r"QuickGELU.*give its variant, such as 'ViT-B/32'"):
        read(path)
    for name in ("small", "small-quickgelu"):
        assert read(path, Asked(variant=name)).architecture == variants.VARIANTS[name]


def test_quickgelu_weights_are_not_computed_with_gelu_unless_one_insists(small_variants, tmp_path):
    path = state_dict(tmp_path / "openai.pt", numbers=True)
    assert read(path, Asked(variant="small-quickgelu")).architecture == VIT
    with pytest.raises(UserError, match=r"(?s)QuickGELU.*GELU.*activation"):
        read(path, Asked(variant="small"))
    insisted = read(path, Asked(variant="small", activation="quick_gelu"))
    assert insisted.architecture == VIT
    assert read(path, Asked(activation="gelu")).architecture == variants.VARIANTS["small"]


def test_an_activation_that_is_insisted_on_is_computed_whatever_a_folder_says(vit, tmp_path):
    convert(vit, "open_clip", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "open_clip_config.json").read_text())
    del config["model_cfg"]["quick_gelu"]
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    archive.write(tmp_path / "model" / "open_clip_pytorch_model.bin", openai.state_dict(read(vit)))
    with pytest.raises(UserError, match=r"OpenAI's .*QuickGELU.*insist by activation="):
        read(tmp_path / "model")
    for activation in ("quick_gelu", "gelu"):
        found = read(tmp_path / "model", Asked(activation=activation)).architecture
        assert (found.image.activation, found.text.activation) == (activation, activation)


def test_a_resnets_bare_name_is_openais_and_does_not_say_what_a_state_dict_is(tmp_path):
    tensors = {name: x for name, x in openai.state_dict(drawn(RESNET)).items() if name not in openai.NUMBERS}
    archive.write(tmp_path / "rn.pt", tensors)
    with pytest.raises(UserError, match=r"'RN50' is OpenAI's, OpenCLIP's are RN50-quickgelu and RN50-gelu"):
        read(tmp_path / "rn.pt", Asked(variant="RN50"))


@pytest.mark.parametrize("size", ["48", 48.0, True])
def test_a_size_that_is_no_whole_number_is_refused(size, vit):
    with pytest.raises(UserError, match=r"image_size=.* should be a whole number"):
        read(vit, Asked(image_size=size))


def test_files_of_other_kinds_are_told_apart(vit, tmp_path):
    (tmp_path / "damaged.pt").write_bytes(vit.read_bytes()[:-30] + b"PK\x05\x06" + bytes(18))
    with pytest.raises(UserError, match=r"damaged\.pt: "):
        read(tmp_path / "damaged.pt")
    convert(vit, "huggingface", tmp_path / "theirs")
    with pytest.raises(UserError, match="Hugging Face's names; give the folder"):
        read(tmp_path / "theirs" / "model.safetensors", Asked(variant="ViT-B/32"))
    with pytest.raises(UserError, match="another folder"):
        convert(vit, "open_clip", tmp_path / "theirs")


@pytest.mark.parametrize("folder_format", ["open_clip", "huggingface", "clip_jax"])
def test_a_folders_activation_is_checked_against_the_variant(folder_format, small_variants, vit, tmp_path):
    convert(vit, folder_format, tmp_path / "model")
    assert read(tmp_path / "model", Asked(variant="small-quickgelu")).variant
    words = r"image\.activation is 'quick_gelu', not 'gelu'.*text\.activation.*activation="
    with pytest.raises(UserError, match=words):
        read(tmp_path / "model", Asked(variant="small"))
    with pytest.raises(UserError, match="activation='relu'"):
        read(tmp_path / "model", Asked(activation="relu"))


def test_a_model_loads_for_other_sizes_and_says_which_do_not_fit(vit):
    model, _ = clip_jax.load(vit, image_size=48, context_length=20)
    assert (model.architecture.image.image_size, model.context_length) == (48, 20)
    pixels = np.zeros((1, 48, 48, 3), np.float32)
    assert np.isfinite(model.encode_image(pixels)).all()
    assert model.tokenize(["a dog"]).shape == (1, 20)
    with pytest.raises(UserError, match=r"image_size=50 .*patch_size=16.* 48 and 64"):
        clip_jax.load(vit, image_size=50)
    same = clip_jax.load(vit, image_size=32, context_length=77)[0].weights
    for ours, expected in zip(jax.tree.leaves(same), jax.tree.leaves(clip_jax.load(vit)[0].weights), strict=True):
        np.testing.assert_array_equal(ours, expected)


# --- what lies where ---


def test_a_folder_with_two_formats_is_openclips(vit, tmp_path):
    convert(vit, "huggingface", tmp_path / "h")
    convert(vit, "open_clip", tmp_path / "o")
    for file in (tmp_path / "o").iterdir():
        file.rename(tmp_path / "h" / file.name)
    assert pretrained.read(tmp_path / "h").architecture == VIT


@pytest.mark.parametrize("target_format", ["open_clip", "huggingface", "clip_jax"])
def test_a_folder_that_holds_anything_else_is_not_written_into(target_format, vit, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="another folder"):
        convert(vit, target_format, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
