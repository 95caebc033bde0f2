"""Our own format: what is written is read, nothing half-written is ever read, and nothing else is taken for it."""

import dataclasses
import json
import resource
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from clip_jax.architecture import Architecture, ResNetTower, TextTower, Tokenize
from clip_jax.config import Config, ModelConfig
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.weights.bundle import Bundle, is_bundle, read_folder, variant_of, write_folder
from clip_jax.weights.mapping import flatten
from clip_jax.workdir import Workdir

RESNET = Architecture(
    16,
    ResNetTower(image_size=32, width=4, depths=(1, 1, 2, 1), num_heads=2),
    TextTower(context_length=8, vocab_size=20, width=64, depth=2, num_heads=1, mlp_dim=256, activation="gelu"),
)
SMALL = "ViT-W64/4@16px"


def some_bundle(architecture: Architecture = RESNET, *, seed: int = 0, dtype: type = np.float32) -> Bundle:
    rng = np.random.default_rng(seed)
    arrays = {
        path: np.asarray(rng.normal(size=like.shape) * 99).astype(np.int32 if like.dtype == np.int32 else dtype)
        for path, like in flatten(Definition(architecture).shapes()).items()
    }
    return Bundle(architecture, arrays, variant_of(architecture, "mine"), "a test")


def assert_same(found: Bundle, expected: Bundle) -> None:
    assert (found.architecture, found.variant) == (expected.architecture, expected.variant)
    assert found.tokenizer == expected.tokenizer
    assert found.arrays.keys() == expected.arrays.keys()
    for path, x in expected.arrays.items():
        assert (found.arrays[path].dtype, found.arrays[path].shape) == (x.dtype, x.shape)
        assert found.arrays[path].tobytes() == x.tobytes()


def change(path: Path, **fields) -> None:
    """Sets fields of a config.json; one that becomes None is taken out."""
    content = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({name: x for name, x in content.items() if x is not None}))


@pytest.mark.parametrize("architecture", [RESNET, VARIANTS[SMALL]], ids=["RN", "ViT"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_what_is_written_is_read_bit_for_bit_in_its_own_dtype(architecture, dtype, tmp_path):
    written = some_bundle(architecture, dtype=dtype)
    write_folder(tmp_path / "a" / "model", written)
    found = read_folder(tmp_path / "a" / "model")
    assert_same(found, written)
    assert found.origin == str(tmp_path / "a" / "model")


BY_FILE = dataclasses.replace(RESNET, tokenize=Tokenize("file", "canonicalize", pad_id=1))


def test_a_tokenizer_in_a_file_lies_beside_the_weights(tmp_path):
    written = dataclasses.replace(some_bundle(BY_FILE), tokenizer='{"model": "日"}')
    write_folder(tmp_path, written)
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == written.tokenizer
    assert_same(read_folder(tmp_path), written)
    write_folder(tmp_path, dataclasses.replace(written, tokenizer="{}"))
    assert read_folder(tmp_path).tokenizer == "{}"


def test_a_tokenizer_of_somebody_elses_that_lies_there_is_not_taken_for_clips_own(tmp_path):
    write_folder(tmp_path, some_bundle())
    (tmp_path / "tokenizer.json").write_text("{}")
    assert read_folder(tmp_path).tokenizer is None


def test_the_same_model_gives_the_same_bytes_and_the_files_are_as_readable_as_any(tmp_path):
    for name in "ab":
        write_folder(tmp_path / name, some_bundle())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()}
    assert len(modes) == 1


def test_floats_are_read_in_the_dtype_asked_for(tmp_path):
    written = some_bundle(dtype=np.float16)
    write_folder(tmp_path, written)
    found = read_folder(tmp_path, np.float32)
    for path, x in written.arrays.items():
        assert found.arrays[path].dtype == (np.int32 if x.dtype == np.int32 else np.float32)
        np.testing.assert_array_equal(found.arrays[path], x)


def test_arrays_that_do_not_lie_in_order_are_written_by_value(tmp_path):
    written = some_bundle()
    turned = {path: np.asarray(x, order="F") for path, x in written.arrays.items()}
    write_folder(tmp_path, dataclasses.replace(written, arrays=turned))
    assert_same(read_folder(tmp_path), written)


def test_other_readers_of_safetensors_see_our_paths(tmp_path):
    written = some_bundle()
    write_folder(tmp_path, written)
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == written.arrays.keys()
    assert all(np.array_equal(theirs[path], x) for path, x in written.arrays.items())


def test_the_config_says_whose_weights_they_are(tmp_path):
    write_folder(tmp_path, some_bundle(VARIANTS[SMALL]))
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.keys() == {"format", "variant", "architecture", "resize_kernel"}
    assert (content["format"], content["variant"]) == ("clip_jax", SMALL)
    assert content["architecture"]["image"]["patch_size"] == 4


def test_every_variant_is_known_by_its_architecture():
    found = [variant_of(architecture, "?") for architecture in VARIANTS.values()]
    assert [VARIANTS[name] for name in found] == list(VARIANTS.values())
    assert all(name.endswith("-quickgelu") for name in set(VARIANTS) - set(found)), "OpenAI's go by OpenAI's names"
    assert variant_of(RESNET, "mine") == "mine"


def test_a_field_that_an_older_file_lacks_takes_its_default(tmp_path):
    write_folder(tmp_path, some_bundle(VARIANTS[SMALL]))
    content = json.loads((tmp_path / "config.json").read_text())["architecture"]
    del content["preprocess"], content["text"]["activation"]
    change(tmp_path, architecture=content)
    assert read_folder(tmp_path).architecture == VARIANTS[SMALL]


def test_a_runs_folder_and_ours_are_told_apart_by_what_is_in_them(tmp_path):
    write_folder(tmp_path / "model", some_bundle(VARIANTS[SMALL]))
    Workdir(tmp_path / "run").claim(Config(model=ModelConfig(variant=SMALL)), VARIANTS[SMALL])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json cannot be read: .*recursion"):
        read_folder(tmp_path / "deep")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    assert [path.name for path in sorted(tmp_path.iterdir()) if is_bundle(path)] == ["model"]
    assert not is_bundle(tmp_path / "nowhere")
    assert not is_bundle(tmp_path / "model" / "config.json")
    with pytest.raises(UserError, match=r"config\.json: format=None should be 'clip_jax'"):
        read_folder(tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "safetensors"}, "format='safetensors'"),
        ({"variant": None}, "variant=None should be str"),
        ({"architecture": None}, "architecture=None should be dict"),
        ({"architecture": []}, r"architecture=\[\] should be dict"),
        ({"architecture": {}}, "architecture: missing fields: embed_dim, image, text"),
    ],
)
def test_a_config_that_is_not_ours_is_refused_by_its_field(fields, words, tmp_path):
    write_folder(tmp_path, some_bundle())
    change(tmp_path, **fields)
    with pytest.raises(UserError, match=rf"config\.json: .*{words}"):
        read_folder(tmp_path)


def test_a_config_with_a_field_of_another_type_is_refused_by_its_path(tmp_path):
    write_folder(tmp_path, some_bundle())
    content = json.loads((tmp_path / "config.json").read_text())["architecture"]
    content["text"]["width"] = "wide"
    change(tmp_path, architecture=content)
    with pytest.raises(UserError, match=r"text\.width='wide' should be int"):
        read_folder(tmp_path)


def test_one_error_lists_all_tensors_that_are_not_the_architectures(tmp_path):
    written = some_bundle()
    arrays = written.arrays | {"image/extra": np.zeros(3), "text/projection": np.zeros((16, 64), np.float32)}
    del arrays["logit_scale"]
    write_folder(tmp_path, dataclasses.replace(written, arrays=arrays))
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'model.safetensors'}: its tensors do not fit; missing (1): logit_scale; "
        "not known (1): image/extra; of another shape or kind (1): "
        "text/projection is float32 [16, 64], not float [64, 16]"
    )


def test_a_folder_of_ours_is_replaced_and_what_else_is_in_it_stays(tmp_path):
    write_folder(tmp_path, some_bundle())
    (tmp_path / "README.md").write_text("mine")
    write_folder(tmp_path, some_bundle(VARIANTS[SMALL]))
    assert_same(read_folder(tmp_path), some_bundle(VARIANTS[SMALL]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "README.md", ".hidden"])
def test_a_folder_with_anything_else_is_refused_and_left_alone(name, tmp_path):
    (tmp_path / name).write_text('{"config": {}}')
    with pytest.raises(UserError, match="something other than a model"):
        write_folder(tmp_path, some_bundle())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(UserError, match="Not a directory"):
        write_folder(tmp_path / name, some_bundle())


def test_a_disk_that_fills_up_leaves_the_old_model(tmp_path):
    write_folder(tmp_path, some_bundle())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*model\.safetensors: File too large"):
            write_folder(tmp_path, some_bundle(VARIANTS[SMALL]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(read_folder(tmp_path), some_bundle())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("method", "name", "survives"),
    [("unlink", "config.json", True), ("replace", ".model", False), ("replace", ".config", False)],
    ids=["the old config goes", "the weights get their name", "the config gets its name"],
)
def test_an_end_at_any_step_leaves_the_old_model_or_none(method, name, survives, tmp_path, monkeypatch):
    before = getattr(Path, method)

    def end(path: Path, *arguments, **keywords):
        if path.name.startswith(name):
            raise KeyboardInterrupt
        return before(path, *arguments, **keywords)

    write_folder(tmp_path, some_bundle(seed=0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, end)
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path, some_bundle(seed=1))
    if survives:
        assert_same(read_folder(tmp_path), some_bundle(seed=0))
    else:
        with pytest.raises(UserError, match=r"config\.json cannot be read: No such file"):
            read_folder(tmp_path)
    write_folder(tmp_path, some_bundle(seed=2))
    assert_same(read_folder(tmp_path), some_bundle(seed=2))


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_killed_process_leaves_is_no_hindrance(finished, tmp_path):
    if finished:
        write_folder(tmp_path, some_bundle(seed=0))
        (tmp_path / "config.json").unlink()
    (tmp_path / ".config.123.0a1b2c3d.json").write_text("{")
    (tmp_path / ".model.123.0a1b2c3d.safetensors").write_text("half")
    write_folder(tmp_path, some_bundle(seed=1))
    assert_same(read_folder(tmp_path), some_bundle(seed=1))


def test_weights_of_someone_elses_are_not_overwritten(tmp_path):
    safetensors.numpy.save_file({"model.weight": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="something other than a model"):
        write_folder(tmp_path, some_bundle())


WITH_TOKENIZER = dataclasses.replace(
    some_bundle(dataclasses.replace(RESNET, tokenize=Tokenize("file", pad_id=1))), tokenizer='{"é": "\\u2028"}\r\n'
)


def test_a_tokenizer_travels_with_the_weights_letter_by_letter(tmp_path):
    write_folder(tmp_path, WITH_TOKENIZER)
    found = read_folder(tmp_path)
    assert_same(found, WITH_TOKENIZER)
    assert found.tokenizer == WITH_TOKENIZER.tokenizer
    assert (tmp_path / "tokenizer.json").read_bytes() == WITH_TOKENIZER.tokenizer.encode()


def test_a_tokenizer_of_the_model_that_is_replaced_does_not_stay(tmp_path):
    write_folder(tmp_path, WITH_TOKENIZER)
    write_folder(tmp_path, some_bundle())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert read_folder(tmp_path).tokenizer is None


def test_a_model_that_lacks_its_tokenizer_is_not_written(tmp_path):
    with pytest.raises(UserError, match=r"mine of a test has no tokenizer; its folder should have a tokenizer\.json"):
        write_folder(tmp_path, dataclasses.replace(WITH_TOKENIZER, tokenizer=None))
    assert not list(tmp_path.iterdir())


def test_a_model_whose_tokenizer_is_not_there_is_refused_with_all_else_that_is_wrong(tmp_path):
    write_folder(tmp_path, dataclasses.replace(WITH_TOKENIZER, arrays=dict(list(WITH_TOKENIZER.arrays.items())[1:])))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"do not fit; missing \(1\): .*; .*tokenizer\.json cannot be read: No such file"
    ):
        read_folder(tmp_path)
    write_folder(tmp_path, WITH_TOKENIZER)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read: .*0xff.*beside its weights"):
        read_folder(tmp_path)


def test_a_folder_can_be_written_over_with_what_is_read_from_it(tmp_path):
    write_folder(tmp_path, some_bundle())
    write_folder(tmp_path, read_folder(tmp_path))
    assert_same(read_folder(tmp_path), some_bundle())


def test_the_familys_way_to_resize_positions_is_kept_and_an_older_folder_has_openclips(tmp_path):
    write_folder(tmp_path, dataclasses.replace(some_bundle(VARIANTS[SMALL]), resize_kernel="bicubic"))
    assert read_folder(tmp_path).resize_kernel == "bicubic"
    change(tmp_path, resize_kernel=None)
    assert read_folder(tmp_path).resize_kernel == "bicubic_antialias"
    change(tmp_path, resize_kernel=["bicubic"])
    with pytest.raises(UserError, match=r"resize_kernel=\['bicubic'\] is not one of bicubic_antialias, bicubic"):
        read_folder(tmp_path)
