"""The facade: OpenAI's calls, compiled for a few sizes; `load` of names, files, folders and runs."""

import dataclasses
import functools
import hashlib
import http.server
import inspect
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import openai_clip
from PIL import Image

import clip_jax
from clip_jax import compiled
from clip_jax.api import Model
from clip_jax.architecture import Architecture, TextTower, ViTTower
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.weights import openai
from clip_jax.weights.bundle import Bundle, write_folder
from clip_jax.weights.download import RELEASES, Release
from clip_jax.weights.mapping import flatten


@pytest.fixture(scope="module")
def loaded(workdir):
    return clip_jax.load(workdir)


@pytest.fixture(scope="module")
def images(loaded):
    _, preprocess = loaded
    random = np.random.default_rng(0)
    return np.stack([preprocess(Image.fromarray(random.integers(0, 256, (30, 20, 3), np.uint8))) for _ in range(3)])


def test_the_calls_of_the_readme_give_features_and_logits(loaded, images):
    model, _ = loaded
    tokens = clip_jax.tokenize(["a handwritten seven", "the number 3"])
    assert images.shape == (3, 16, 16, 3)
    assert images.dtype == np.float32
    img, txt = model.encode_image(images), model.encode_text(tokens)
    assert img.shape == (3, 64)
    assert txt.shape == (2, 64)
    per_image, per_text = model(images, tokens)
    img, txt = (np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (img, txt))
    scale = np.exp(float(model.weights.params["logit_scale"]))
    np.testing.assert_allclose(per_image, scale * img @ txt.T, atol=1e-5 * scale)
    np.testing.assert_array_equal(per_text, per_image.T)


def test_tokens_of_the_models_own_context_length_give_the_same_features(loaded):
    model, _ = loaded
    texts = ["a handwritten seven", "one"]
    assert model.tokenize(texts).shape == (2, 16)
    np.testing.assert_array_equal(model.encode_text(model.tokenize(texts)), model.encode_text(clip_jax.tokenize(texts)))
    cut = model.tokenize(texts)[:, :7]  # a caller may have cut them, too
    np.testing.assert_array_equal(model.encode_text(model.tokenize(texts)), model.encode_text(cut))


def test_a_caption_longer_than_the_models_context_is_refused(loaded):
    model, _ = loaded
    with pytest.raises(UserError, match="context length 16"):
        model.encode_text(clip_jax.tokenize("a very long caption " * 4))


def test_images_of_another_size_are_refused(loaded):
    model, _ = loaded
    with pytest.raises(UserError, match=r"\[n, 16, 16, 3\]"):
        model.encode_image(np.zeros((1, 224, 224, 3), np.float32))


# --- compiled for a few sizes ---


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What XLA has compiled since the test began."""
    seen: list[str] = []

    def listen(event: str, _: float, **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def fresh():
    """A model that nothing has been compiled for, whose text tower knows 77 positions."""
    arch = dataclasses.replace(
        VARIANTS["ViT-W64/4@16px"], text=TextTower(77, 49408, width=32, depth=2, num_heads=2, mlp_dim=48)
    )
    definition = Definition(arch)
    weights = jax.jit(definition.init)(jax.random.key(0))
    model = Model(definition, compiled.place(flatten(weights), definition), "test", "random")
    jax.clear_caches()
    return model


def captions(lengths: Sequence[int]) -> np.ndarray:
    """Returns tokens of captions of so many tokens, SOT and EOT included."""
    random = np.random.default_rng(0)
    tokens = np.zeros((len(lengths), 77), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = [49406, *random.integers(1, 49406, length - 2), 49407]
    return tokens


SIZES = [*range(1, 15), 31, 32, 33, 100, 257, 400]  # 20


@pytest.mark.parametrize("longest", [9, 30])
def test_20_batch_sizes_in_a_row_cost_at_most_6_compilations(fresh, compilations, longest):
    tokens = captions(np.random.default_rng(2).integers(3, longest + 1, 400))
    features = {n: fresh.encode_text(tokens[:n]) for n in SIZES}
    assert 0 < len(compilations) <= 6
    assert [len(x) for x in features.values()] == SIZES


def test_batch_sizes_of_images_and_of_both_cost_as_little_jax_arrays_or_not(fresh, compilations):
    images = np.random.default_rng(1).normal(size=(400, 16, 16, 3)).astype(np.float32)
    tokens = captions([9] * 400)
    batches = [(jnp.asarray(images[:n]), jnp.asarray(tokens[:n])) for n in SIZES]
    compilations.clear()
    for image, _ in batches:
        fresh.encode_image(image)
    assert 0 < len(compilations) <= 6
    for _, token in batches:
        fresh.encode_text(token)
    compilations.clear()
    for image, token in batches:
        fresh(image, tokens[:5])
        fresh(images[:5], token)
    assert len(compilations) <= 6


def test_results_do_not_depend_on_the_batch_that_a_row_came_in(fresh):
    tokens = captions([3, 20, 7, 77, 40, 16, 2, 24, 25, 11, 30])
    images = np.random.default_rng(1).normal(size=(11, 16, 16, 3)).astype(np.float32)
    for encode, inputs in ((fresh.encode_text, tokens), (fresh.encode_image, images)):
        together = encode(inputs)
        alone = np.concatenate([encode(inputs[i : i + 1]) for i in range(len(inputs))])
        # Programs for other sizes add in another order: a few roundings of float32.
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    per_image, per_text = fresh(images, tokens[:5])
    pairs = np.array([[fresh(images[i : i + 1], tokens[j : j + 1])[0].item() for j in range(5)] for i in range(11)])
    np.testing.assert_allclose(per_image, pairs, rtol=0, atol=1e-5 * np.abs(pairs).max())
    np.testing.assert_array_equal(per_text, per_image.T)


@pytest.mark.parametrize(
    "longest", [2, 16, 17, 77, *[pytest.param(n, marks=pytest.mark.full) for n in (15, 24, 25, 32, 33, 48, 49, 76)]]
)
def test_text_is_computed_up_to_the_longest_caption_only_with_the_features_of_all_77_positions(fresh, longest):
    tokens = captions([longest, 2, max(2, longest - 3), longest, *[2] * 4])
    lengths = []
    whole = jax.jit(fresh.definition.bind(fresh.weights).encode_text)(tokens)
    encode = compiled.encode_text
    with mock.patch.object(
        compiled, "encode_text", lambda *inputs: lengths.append(inputs[-1].shape) or encode(*inputs)
    ):
        found = fresh.encode_text(tokens)
    assert lengths == [(8, next(n for n in (16, 24, 32, 48, 77) if n >= longest))]
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_no_images_and_no_captions_give_no_features(fresh):
    assert fresh.encode_image(np.zeros((0, 16, 16, 3), np.float32)).shape == (0, 64)
    assert fresh.encode_text(np.zeros((0, 77), np.int32)).shape == (0, 64)
    assert fresh(np.zeros((2, 16, 16, 3), np.float32), np.zeros((0, 77), np.int32))[0].shape == (2, 0)


def test_features_may_be_changed_in_place_as_the_original_snippets_do(fresh):
    features = fresh.encode_text(captions([5, 6, 7]))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-6)


def test_text_states_are_those_of_each_block_and_the_last_normed_one_pools_to_the_features(fresh):
    tokens = captions([5, 77, 20])
    last, penultimate = fresh.text_states(tokens), fresh.text_states(tokens, -2)
    assert last.shape == penultimate.shape == (3, 77, 32)
    pooled = last[np.arange(3), tokens.argmax(axis=1)] @ np.asarray(fresh.weights.params["text"]["projection"])
    np.testing.assert_allclose(pooled, fresh.encode_text(tokens), rtol=0, atol=1e-5 * np.abs(pooled).max())
    raw = fresh.text_states(tokens, 0, post_norm=False)
    normed = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(penultimate, normed, atol=1e-4)  # a new layer norm has no gain and no bias
    with pytest.raises(UserError, match=r"layer=2.*2 blocks"):
        fresh.text_states(tokens, 2)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.zeros(77, np.int32), r"\[77\], not integers \[n, length\]"),
        (np.zeros((2, 3, 77), np.int32), r"\[2, 3, 77\]"),
        (np.zeros((2, 77)), "float64"),
        (np.zeros((2, 0), np.int32), r"\[2, 0\]"),
        (np.full((1, 77), 49408), "from 49408 to 49408: this model knows 0 to 49407"),
        (np.full((1, 77), 2**32 + 320), "4294967616"),
        (np.full((1, 77), -1), "from -1"),
    ],
    ids=str,
)
def test_what_are_no_tokens_of_the_model_is_refused_where_jax_would_clamp_or_wrap(fresh, tokens, words):
    for call in (Model.encode_text, Model.text_states):
        with pytest.raises(UserError, match=words):
            inspect.unwrap(call)(fresh, tokens)  # as users call it: without jaxtyping before it


def test_pixels_that_were_not_preprocessed_are_refused(fresh):
    with pytest.raises(UserError, match="uint8, not floats"):
        inspect.unwrap(Model.encode_image)(fresh, np.zeros((1, 16, 16, 3), np.uint8))


# --- preprocessing ---


def test_preprocess_takes_one_image_or_several(loaded):
    _, preprocess = loaded
    pictures = [Image.new("RGB", (20 + i, 30), (i, 50, 200)) for i in range(5)]
    batch = preprocess(pictures)
    assert (batch.shape, batch.dtype) == ((5, 16, 16, 3), np.float32)
    np.testing.assert_array_equal(batch, np.stack([preprocess(picture) for picture in pictures]))
    np.testing.assert_array_equal(batch, preprocess(iter(pictures)))
    assert preprocess([]).shape == (0, 16, 16, 3)


@pytest.mark.parametrize("wrong", ["picture.png", [b"\x89PNG"], [Image.new("L", (9, 9)), None], np.zeros((9, 9, 3))])
def test_what_is_no_image_is_refused_by_its_type(loaded, wrong):
    _, preprocess = loaded
    with pytest.raises(UserError, match=r"not a PIL image but \w+; open it"):
        preprocess(wrong)


def test_an_image_that_cannot_be_read_is_named_by_its_place(loaded, tmp_path):
    _, preprocess = loaded
    path = tmp_path / "cut.png"
    Image.effect_noise((50, 50), 90).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"image 1 cannot be prepared: .*truncated"):
        preprocess([Image.new("RGB", (9, 9)), Image.open(io.BytesIO(path.read_bytes()))])


# --- load ---


def test_the_device_may_be_named_as_openais_snippets_do(files):
    model, _ = clip_jax.load(files["file"], "cpu")
    assert {x.device for x in jax.tree.leaves(model.placed)} == {jax.devices("cpu")[0]}
    other, _ = clip_jax.load(files["file"], device=jax.devices()[3])
    assert {x.device for x in jax.tree.leaves(other.placed)} == {jax.devices()[3]}
    np.testing.assert_array_equal(other.encode_text(captions([5])), model.encode_text(captions([5])))
    with pytest.raises(UserError, match="device='tpu' is not to be had here; there are: cpu"):
        clip_jax.load(files["file"], device="tpu")


def test_a_model_knows_its_sizes_and_temperature(files):
    model, _ = clip_jax.load(files["file"])
    assert (model.context_length, model.vocab_size) == (77, 49408)
    np.testing.assert_allclose(np.exp(model.logit_scale), 1 / 0.07, rtol=1e-6)


def test_the_nine_models_have_openais_names_in_openais_order():
    assert clip_jax.available_models() == openai_clip().available_models()


@pytest.fixture(scope="module")
def files(workdir, tmp_path_factory) -> dict[str, Path]:
    """One model in every form that can be loaded."""
    folder = tmp_path_factory.mktemp("files")
    arch = Architecture(
        embed_dim=24,
        image=ViTTower(image_size=16, patch_size=8, width=64, depth=2, num_heads=1, mlp_dim=256),
        text=TextTower(77, 49408, width=64, depth=2, num_heads=1, mlp_dim=256),
    )
    arrays = {path: np.asarray(x) for path, x in flatten(jax.jit(Definition(arch).init)(jax.random.key(0))).items()}
    model = Bundle(arch, arrays, "small", "random")
    openai.write(folder / "small.pt", model)
    write_folder(folder / "small", model)
    return {"file": folder / "small.pt", "folder": folder / "small", "workdir": workdir}


def test_a_file_and_a_folder_of_one_model_give_the_same_features(files):
    tokens = captions([5, 9])
    features = [clip_jax.load(files[kind])[0].encode_text(tokens) for kind in ("file", "folder")]
    np.testing.assert_array_equal(*features)


def test_a_name_is_downloaded_and_loaded(files, tmp_path, monkeypatch):
    content = files["file"].read_bytes()
    folder = tmp_path / hashlib.sha256(content).hexdigest()
    folder.mkdir()
    (folder / "ViT-B-32.pt").write_bytes(content)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/{folder.name}/ViT-B-32.pt"
        monkeypatch.setitem(RELEASES, "ViT-B/32", Release(url))
        model, _ = clip_jax.load("ViT-B/32", download_root=tmp_path / "cache")
        server.shutdown()
    assert model.name == "ViT-B/32"
    again, _ = clip_jax.load("ViT-B/32", download_root=tmp_path / "cache")  # the server is gone
    np.testing.assert_array_equal(again.encode_text(captions([5])), model.encode_text(captions([5])))


def test_bfloat16_computes_in_bfloat16_from_float32_weights(files):
    model, _ = clip_jax.load(files["file"], dtype="bfloat16")
    assert model.encode_text(captions([5])).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(model.placed)} == {jnp.dtype("float32")}
    with pytest.raises(UserError, match=r"dtype='float16'.*bfloat16"):
        clip_jax.load(files["file"], dtype="float16")


def test_a_variant_that_the_weights_are_not_is_refused_with_all_that_differs(files):
    clip_jax.load(files["workdir"], variant="ViT-W64/4@16px")
    with pytest.raises(UserError, match=r"embed_dim is 24, not 64.*image\.num_heads is 1, not 4") as error:
        clip_jax.load(files["file"], variant="ViT-W64/4@16px")
    assert "text.context_length is 77, not 16" in str(error.value)
    with pytest.raises(UserError, match="unknown model variant"):
        clip_jax.load(files["file"], variant="ViT-B32")


def test_an_unknown_name_lists_the_nine():
    with pytest.raises(UserError, match="'ViT-B/23' is no file, no folder") as error:
        clip_jax.load("ViT-B/23")
    assert all(name in str(error.value) for name in clip_jax.available_models())


def test_a_folder_that_holds_no_model_is_refused_and_nothing_is_written(tmp_path, workdir):
    with pytest.raises(UserError, match="not a run's folder"):
        clip_jax.load(tmp_path)
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    with pytest.raises(UserError, match="no checkpoint"):
        clip_jax.load(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"], "loading writes nothing"
