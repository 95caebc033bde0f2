"""OpenAI's files are read whole and written back bit for bit; what the format cannot hold is refused by name."""

import copy
import dataclasses
import functools
import os
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracles import openai_clip, require

from clip_jax.architecture import Architecture, Preprocess, ResNetTower, TextTower, ViTTower
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.weights import archive, openai
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import export_tensors, flatten, import_tensors, source_shapes

# Tensors of OpenAI's released models, the three numbers apart.
TENSORS = {
    "RN50": 489,
    "RN101": 795,
    "RN50x4": 669,
    "RN50x16": 921,
    "RN50x64": 1353,
    "ViT-B/32": 302,
    "ViT-B/16": 302,
    "ViT-L/14": 446,
    "ViT-L/14@336px": 446,
}
TEXT = TextTower(context_length=12, vocab_size=50, width=128, depth=3, num_heads=2, mlp_dim=512)
NARROW = {
    "ViT": Architecture(
        24,
        ViTTower(image_size=32, patch_size=8, width=192, depth=2, num_heads=3, mlp_dim=768),
        dataclasses.replace(TEXT),
    ),
    "RN": Architecture(24, ResNetTower(image_size=64, width=16, depths=(2, 1, 3, 2), num_heads=8), TEXT),
}
both_towers = pytest.mark.parametrize("architecture", NARROW.values(), ids=NARROW)


@functools.cache
def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of OpenAI's tensors for an architecture."""
    return source_shapes(openai.RULES, flatten(Definition(architecture).shapes()))


def some_tensors(architecture: Architecture, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Returns random tensors by OpenAI's names, none of them like another."""
    rng = np.random.default_rng(0)
    return {
        name: np.array(rng.integers(1, 99), np.int64)
        if name.endswith("num_batches_tracked")
        else np.asarray(rng.normal(size=shape)).astype(dtype)
        for name, shape in expected_shapes(architecture).items()
    }


def numbers(image_size: int, context_length: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns the three numbers that lie among the tensors."""
    found = {"input_resolution": image_size, "context_length": context_length, "vocab_size": vocab_size}
    return {name: np.array(n, np.int64) for name, n in found.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("name", TENSORS)
def test_a_released_model_has_as_many_tensors_as_the_table_says_and_its_shapes_say_which_it_is(name):
    shapes = expected_shapes(VARIANTS[name])
    assert len(shapes) == TENSORS[name]
    nothing = {key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()}
    assert openai.architecture_of(nothing) == VARIANTS[name]


@both_towers
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_what_is_read_is_written_bit_for_bit_with_the_three_numbers(architecture, dtype, tmp_path):
    tensors = some_tensors(architecture, dtype)
    archive.write(tmp_path / "their.pt", tensors)
    found = openai.read(tmp_path / "their.pt")
    assert found.architecture == architecture
    assert (found.variant, found.origin) == ("their", str(tmp_path / "their.pt"))
    openai.write(tmp_path / "ours.pt", found)
    assert_same(archive.read(tmp_path / "ours.pt"), tensors | numbers(architecture.image.image_size, 12, 50))
    again = openai.read(tmp_path / "ours.pt")
    assert again.architecture == architecture
    assert_same(again.arrays, found.arrays)


@both_towers
def test_floats_are_read_in_the_dtype_asked_for_and_counts_in_ours(architecture, tmp_path):
    archive.write(tmp_path / "file.pt", some_tensors(architecture, np.float16))
    arrays = openai.read(tmp_path / "file.pt", np.float32).arrays
    shapes = flatten(Definition(architecture).shapes())
    assert {path: (x.shape, x.dtype) for path, x in arrays.items()} == {
        path: (like.shape, like.dtype) for path, like in shapes.items()
    }
    assert_same(arrays, import_tensors(openai.RULES, some_tensors(architecture, np.float16), shapes, np.float32))


def test_values_of_a_vit_lie_where_a_hand_would_put_them():
    theirs = some_tensors(NARROW["ViT"])
    ours = import_tensors(openai.RULES, theirs, flatten(Definition(NARROW["ViT"]).shapes()))
    for i in range(2):
        block = f"visual.transformer.resblocks.{i}."
        for part in range(3):  # queries, keys, values
            for head in range(3):
                rows = slice(part * 192 + head * 64, part * 192 + head * 64 + 64)
                kernel_DK = theirs[block + "attn.in_proj_weight"][rows].T
                bias_K = theirs[block + "attn.in_proj_bias"][rows]
                np.testing.assert_array_equal(ours["image/blocks/attention/qkv/kernel"][i, :, part, head], kernel_DK)
                np.testing.assert_array_equal(ours["image/blocks/attention/qkv/bias"][i, part, head], bias_K)
        for head in range(3):
            kernel_KD = theirs[block + "attn.out_proj.weight"][:, head * 64 : head * 64 + 64].T
            np.testing.assert_array_equal(ours["image/blocks/attention/out/kernel"][i, head], kernel_KD)
        for up_or_down, name in (("up", "c_fc"), ("down", "c_proj")):
            kernel = ours[f"image/blocks/mlp/{up_or_down}/kernel"][i]
            np.testing.assert_array_equal(kernel, theirs[f"{block}mlp.{name}.weight"].T)
        np.testing.assert_array_equal(ours["image/blocks/attention_norm/scale"][i], theirs[block + "ln_1.weight"])
        np.testing.assert_array_equal(ours["image/blocks/mlp_norm/bias"][i], theirs[block + "ln_2.bias"])
    np.testing.assert_array_equal(ours["text/blocks/mlp/up/bias"][2], theirs["transformer.resblocks.2.mlp.c_fc.bias"])
    for row, column in np.ndindex(8, 8):
        kernel_CD = theirs["visual.conv1.weight"][:, :, row, column].T
        np.testing.assert_array_equal(ours["image/patch_embed/kernel"][row, column], kernel_CD)
    same = {
        "image/class_embedding": "visual.class_embedding",
        "image/positional_embedding": "visual.positional_embedding",
        "image/pre_norm/bias": "visual.ln_pre.bias",
        "image/post_norm/scale": "visual.ln_post.weight",
        "image/projection": "visual.proj",
        "text/token_embedding": "token_embedding.weight",
        "text/positional_embedding": "positional_embedding",
        "text/post_norm/scale": "ln_final.weight",
        "text/projection": "text_projection",
        "logit_scale": "logit_scale",
    }
    for path, name in same.items():
        np.testing.assert_array_equal(ours[path], theirs[name])


def test_values_of_a_resnet_lie_where_a_hand_would_put_them():
    theirs = some_tensors(NARROW["RN"])
    ours = import_tensors(openai.RULES, theirs, flatten(Definition(NARROW["RN"]).shapes()))
    for row, column in np.ndindex(3, 3):
        for ours_HWDF, name in (
            (ours["image/stem3/kernel"], "conv3"),
            (ours["image/stage4/first/conv2/kernel"], "layer4.0.conv2"),
            (ours["image/stage3/rest/conv2/kernel"][1], "layer3.2.conv2"),
        ):
            kernel_DF = theirs[f"visual.{name}.weight"][:, :, row, column].T
            np.testing.assert_array_equal(ours_HWDF[row, column], kernel_DF)
    same = {
        "image/stem2/norm/scale": "bn2.weight",
        "image/stage2/first/conv3/norm/bias": "layer2.0.bn3.bias",
        "image/stage2/first/shortcut/norm/mean": "layer2.0.downsample.1.running_mean",
        "image/stage1/first/conv1/norm/variance": "layer1.0.bn1.running_var",
        "image/stage1/first/conv1/norm/count": "layer1.0.bn1.num_batches_tracked",
        "image/attention_pool/positional_embedding": "attnpool.positional_embedding",
        "image/attention_pool/out/bias": "attnpool.c_proj.bias",
    }
    for path, name in same.items():
        np.testing.assert_array_equal(ours[path], theirs[f"visual.{name}"])
    np.testing.assert_array_equal(
        ours["image/stage3/rest/conv1/norm/count"],
        [theirs[f"visual.layer3.{j}.bn1.num_batches_tracked"] for j in (1, 2)],
    )
    for head in range(8):
        part = slice(head * 64, head * 64 + 64)
        for path, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            kernel_DK = theirs[f"visual.attnpool.{name}.weight"][part].T
            np.testing.assert_array_equal(ours[f"image/attention_pool/{path}/kernel"][:, head], kernel_DK)
            bias_K = theirs[f"visual.attnpool.{name}.bias"][part]
            np.testing.assert_array_equal(ours[f"image/attention_pool/{path}/bias"][head], bias_K)
        kernel_KE = theirs["visual.attnpool.c_proj.weight"][:, part].T
        np.testing.assert_array_equal(ours["image/attention_pool/out/kernel"][head], kernel_KE)


@both_towers
def test_numbers_that_agree_with_the_shapes_are_taken_and_others_listed(architecture, tmp_path):
    size = architecture.image.image_size
    tensors = some_tensors(architecture)
    archive.write(tmp_path / "good.pt", tensors | numbers(size, 12, 50))
    assert openai.read(tmp_path / "good.pt").architecture == architecture
    archive.write(tmp_path / "bad.pt", tensors | numbers(224, 12, 49408) | {"context_length": np.zeros(3, np.int64)})
    with pytest.raises(UserError) as error:
        openai.read(tmp_path / "bad.pt")
    for words in (
        str(tmp_path / "bad.pt"),
        f"input_resolution=224, but the shapes say {size}",
        "context_length=[0, 0, 0], but the shapes say 12",
        "vocab_size=49408, but the shapes say 50",
    ):
        assert words in str(error.value)


def test_one_error_lists_all_that_is_missing_not_known_and_of_another_shape(tmp_path):
    tensors = some_tensors(NARROW["ViT"]) | {"visual.head.weight": np.zeros((3, 4)), "step": np.array(7)}
    del tensors["logit_scale"], tensors["visual.transformer.resblocks.1.mlp.c_fc.bias"]
    tensors["visual.proj"] = np.zeros((192, 25), np.float32)
    tensors["visual.ln_pre.bias"] = np.zeros(191, np.float16)
    archive.write(tmp_path / "file.pt", tensors)
    with pytest.raises(UserError) as error:
        openai.read(tmp_path / "file.pt")
    assert str(error.value) == (
        f"{tmp_path / 'file.pt'}: "
        "its tensors do not fit; missing (2): logit_scale, visual.transformer.resblocks.1.mlp.c_fc.bias; "
        "not known (2): visual.head.weight, step; "
        "of another shape or kind (2): visual.ln_pre.bias is float16 [191], not float [192], "
        "visual.proj is float32 [192, 25], not float [192, 24]"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "no text_projection .2 dimensions., no token_embedding.weight .*1 tensors the first are weight"),
        ({"visual.proj": None}, r"no visual\.proj"),
        ({"visual.conv1.weight": (192, 3)}, r"no visual\.conv1\.weight .4 dimensions."),
        ({"visual.conv1.weight": (192, 3, 8, 0)}, r"no visual\.conv1\.weight .4 dimensions."),
        ({"visual.positional_embedding": (16, 192)}, "16 positions in the image tower are no square and one"),
        ({"visual.positional_embedding": (1, 192)}, "1 positions in the image tower"),
        ({"token_embedding.weight": (50, 32)}, "text tower's width=32 is less than one of OpenAI's heads: 64"),
        ({"visual.conv1.weight": (200, 3, 8, 8)}, "width=200 is not a multiple of num_heads=3"),
        ({"transformer.resblocks.0.mlp.c_fc.weight": (511, 128)}, r"c_fc\.weight has 511 rows, not 4 × 128"),
    ],
)
def test_a_file_that_is_no_clip_by_openais_names_is_refused_by_what_it_lacks(changes, words, tmp_path):
    tensors = (some_tensors(NARROW["ViT"]) if changes else {"weight": np.zeros(3)}) | {
        name: np.zeros(shape) for name, shape in changes.items() if shape
    }
    archive.write(tmp_path / "file.pt", {name: x for name, x in tensors.items() if changes.get(name, ...) is not None})
    with pytest.raises(UserError, match=rf"file\.pt: .*{words}"):
        openai.read(tmp_path / "file.pt")


def test_a_resnet_without_a_stage_is_refused():
    tensors = {name: x for name, x in some_tensors(NARROW["RN"]).items() if "layer3" not in name}
    with pytest.raises(UserError, match=r"depths=\(2, 1, 0, 2\)"):
        openai.architecture_of(tensors)


def test_a_file_with_more_blocks_than_any_model_is_refused_before_it_is_built(tmp_path):
    many = {f"visual.layer2.{i}.x": np.zeros(1, np.float32) for i in range(60_000)}
    with pytest.raises(UserError, match=r"depths=\(2, 60000, 3, 2\): every stage of a ResNet has 1 to 256") as error:
        openai.architecture_of(some_tensors(NARROW["RN"]) | many)
    assert len(str(error.value)) < 200


def test_only_the_masks_of_a_trace_are_left_out(tmp_path):
    tensors, mask = some_tensors(NARROW["ViT"]), np.zeros((12, 12), np.float32)
    masks = {f"{tower}transformer.resblocks.1.attn_mask": mask for tower in ("", "visual.")}
    archive.write(tmp_path / "file.pt", tensors | masks)
    assert openai.read(tmp_path / "file.pt").architecture == NARROW["ViT"]
    archive.write(tmp_path / "file.pt", tensors | masks | {"my_attn_mask": mask, "x.attn_mask": mask})
    with pytest.raises(UserError, match=r"not known \(2\): my_attn_mask, x\.attn_mask"):
        openai.read(tmp_path / "file.pt")


def identity(path: Path) -> tuple[int, ...]:
    """Returns what a write would change; a look at a link changes its time of access."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("kind", ["text", "folder", "fifo", "link", "dangling"])
def test_what_is_there_and_no_pytorch_file_is_never_overwritten(kind, tmp_path):
    target, notes = tmp_path / "target", tmp_path / "notes.txt"
    notes.write_text("mine")
    {
        "text": lambda: target.write_text("mine"),
        "folder": target.mkdir,
        "fifo": lambda: os.mkfifo(target),
        "link": lambda: target.symlink_to(notes),
        "dangling": lambda: target.symlink_to(tmp_path / "nowhere"),
    }[kind]()
    before = identity(target)
    with pytest.raises(UserError, match="target is there already and no PyTorch file; choose another name"):
        openai.write(target, bundle_of(NARROW["ViT"]))
    assert identity(target) == before
    assert sorted(tmp_path.iterdir()) == [notes, target]
    assert notes.read_text() == "mine"


def test_a_pytorch_file_is_replaced(tmp_path):
    archive.write(tmp_path / "file.pt", {"x": np.zeros(3)})
    openai.write(tmp_path / "file.pt", bundle_of(NARROW["ViT"]))
    assert openai.read(tmp_path / "file.pt").architecture == NARROW["ViT"]


def bundle_of(architecture: Architecture) -> Bundle:
    shapes = flatten(Definition(architecture).shapes())
    return Bundle(architecture, {path: np.zeros(x.shape, x.dtype) for path, x in shapes.items()}, "mine", "a test")


def changed(name: str, *, image: dict | None = None, text: dict | None = None, **fields) -> Architecture:
    was = NARROW[name]
    towers = {
        "image": dataclasses.replace(was.image, **(image or {})),
        "text": dataclasses.replace(was.text, **(text or {})),
    }
    return dataclasses.replace(was, **towers, **fields)


@pytest.mark.parametrize(
    ("architecture", "reasons"),
    [
        (changed("ViT", image={"num_heads": 4}), ["image.num_heads=3 for 4"]),
        (changed("RN", image={"num_heads": 4}), ["image.num_heads=8 for 4"]),
        (changed("ViT", text={"num_heads": 1}), ["text.num_heads=2 for 1"]),
        (changed("ViT", image={"mlp_dim": 700}), ["image.mlp_dim=768 for 700"]),
        (changed("RN", text={"mlp_dim": 700}), ["text.mlp_dim=512 for 700"]),
        (changed("ViT", image={"activation": "gelu"}), ["image.activation='quick_gelu' for 'gelu'"]),
        (changed("RN", text={"width": 32, "num_heads": 1}), ["width=32 is less than one of OpenAI's heads"]),
        (changed("RN", preprocess=Preprocess(mean=(0.5, 0.5, 0.5))), ["preprocess.mean=", "for (0.5, 0.5, 0.5)"]),
        (
            changed("ViT", image={"num_heads": 1}, text={"activation": "gelu", "mlp_dim": 100}),
            ["image.num_heads=3 for 1", "text.mlp_dim=512 for 100", "text.activation='quick_gelu' for 'gelu'"],
        ),
        (VARIANTS["ViT-W64/4@16px"], ["image.num_heads=1 for 4", "text.num_heads=1 for 4"]),
        (VARIANTS["ViT-W96/8@40px"], ["image.num_heads=1 for 4", "text.num_heads=1 for 4"]),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_every_reason(architecture, reasons, tmp_path):
    with pytest.raises(UserError, match="mine: OpenAI's format cannot hold it") as error:
        openai.write(tmp_path / "file.pt", bundle_of(architecture))
    for reason in reasons:
        assert reason in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_a_model_has_beside_the_table_is_never_left_out(tmp_path):
    whole = bundle_of(NARROW["ViT"])
    with pytest.raises(AssertionError, match="logit_bias"):
        openai.write(
            tmp_path / "file.pt", dataclasses.replace(whole, arrays=whole.arrays | {"logit_bias": np.zeros(())})
        )


@functools.cache
def original(name: str, *, half: bool):
    """Returns OpenAI's own model, random in all that it has; `half` makes it as its released files are."""
    clip, torch, architecture = openai_clip(), require("torch"), NARROW[name]
    image, text = architecture.image, architecture.text
    depth, patch_size = (image.depth, image.patch_size) if name == "ViT" else (image.depths, None)
    heads = text.width // 64
    sizes = (image.image_size, depth, image.width, patch_size, text.context_length, text.vocab_size, text.width, heads)
    model = clip.model.CLIP(architecture.embed_dim, *sizes, text.depth).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
        else:
            tensor.fill_(int(torch.randint(1, 99, (), generator=generator)))
    if half:
        clip.model.convert_weights(model)
    return model


def state_of(model) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def save(model, path: Path, kind: str) -> None:
    """Saves the model as a state dict, or as the archive of a traced module that OpenAI releases."""
    torch = require("torch")
    if kind == "state dict":
        torch.save(model.state_dict(), path)
        return
    size = model.visual.input_resolution
    images, texts = torch.zeros(2, 3, size, size), torch.zeros(2, model.context_length, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its own format deprecated, and shapes in `if` a risk
        torch.jit.trace(model, (images, texts), check_trace=False).save(path)


@pytest.mark.parametrize("half", [True, False], ids=["float16", "float32"])
@pytest.mark.parametrize("kind", ["state dict", "traced"])
@pytest.mark.parametrize("name", NARROW)
def test_a_file_of_the_original_comes_back_bit_for_bit_and_the_original_loads_it(name, kind, half, tmp_path):
    clip, torch = openai_clip(), require("torch")
    model = original(name, half=half)
    expected = state_of(model)
    save(model, tmp_path / "their.pt", kind)
    found = openai.read(tmp_path / "their.pt")
    assert found.architecture == NARROW[name]
    assert found.arrays.keys() == flatten(Definition(NARROW[name]).shapes()).keys()
    assert_same(export_tensors(openai.RULES, found.arrays), expected)
    assert (np.dtype(np.float16) in {x.dtype for x in found.arrays.values()}) == half

    openai.write(tmp_path / "ours.pt", found)
    with_numbers = expected | numbers(NARROW[name].image.image_size, 12, 50)
    saved = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert_same({name: x.numpy() for name, x in saved.items()}, with_numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, _ = clip.load(str(tmp_path / "their.pt"), device="cpu")
        ours, preprocess = clip.load(str(tmp_path / "ours.pt"), device="cpu")
    assert_same(state_of(ours), state_of(theirs))
    assert preprocess.transforms[0].size == NARROW[name].image.image_size
    if half:  # then nothing is lost when it is loaded
        assert_same(state_of(ours), state_of(copy.deepcopy(model).float()))


def test_an_archive_with_the_three_numbers_among_its_buffers_is_read(tmp_path):
    torch = require("torch")
    model = original("ViT", half=False)
    holder = torch.nn.Module()
    for name, n in numbers(32, 12, 50).items():
        holder.register_buffer(name, torch.tensor(int(n)))
    for name, child in model.named_children():
        holder.add_module(name, child)
    for name, parameter in model.named_parameters(recurse=False):
        holder.register_parameter(name, parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder.forward = lambda x: x + holder.context_length
        torch.jit.trace(holder, torch.zeros(1)).save(tmp_path / "file.pt")
    assert numbers(32, 12, 50).keys() < archive.read(tmp_path / "file.pt").keys()
    assert_same(export_tensors(openai.RULES, openai.read(tmp_path / "file.pt").arrays), state_of(model))
