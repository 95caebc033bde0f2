"""Both towers against NumPy in float64, the promises of `CLIP`, and how parameters start."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from oracles import openai_clip

from clip_jax import losses
from clip_jax.architecture import Architecture, Preprocess, TextTower, ViTTower
from clip_jax.config import MeshConfig
from clip_jax.models.clip import LOGIT_SCALE_MAX, Definition, Weights, constrain, l2_normalise, normalise_pixels
from clip_jax.models.transformer import REMAT
from clip_jax.sharding import BATCH, make_mesh, parameter_specs, path_of

# No two sizes alike where that can be, so that no two dimensions can be taken for each other.
ARCH = Architecture(
    embed_dim=10,
    image=ViTTower(image_size=12, patch_size=4, width=24, depth=3, num_heads=2, mlp_dim=40),
    text=TextTower(context_length=11, vocab_size=50, width=32, depth=2, num_heads=4, mlp_dim=56),
)
DEFINITION = Definition(ARCH)
EOT = ARCH.text.vocab_size - 1


@pytest.fixture(scope="module")
def params():
    """Parameters of which none is zero or one: a term that is left out shows."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.float32(random.normal(0.1, 0.3, x.shape)), DEFINITION.shapes().params)


@pytest.fixture(scope="module")
def images():
    return jnp.float32(np.random.default_rng(1).normal(size=(4, 12, 12, 3)))


@pytest.fixture(scope="module")
def tokens():
    """Captions of 2 to 11 tokens, EOT included, and zeros behind it."""
    random = np.random.default_rng(2)
    rows = np.zeros((4, ARCH.text.context_length), np.int32)
    for row, length in zip(rows, (2, 5, 7, 11), strict=True):
        row[:length] = [*random.integers(1, EOT, length - 1), EOT]
    return jnp.asarray(rows)


# --- the oracle: float64 NumPy, one block at a time ---


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def block(x, p, *, causal):
    h = layer_norm(x, p["attention_norm"])
    q, k, v = (
        np.einsum("bld,dnk->bnlk", h, p["attention"]["qkv"]["kernel"][:, i]) + p["attention"]["qkv"]["bias"][i, :, None]
        for i in range(3)
    )
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal:
        scores += np.triu(np.full(scores.shape[-2:], -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    x = x + np.einsum("bnlk,nkd->bld", mixed, p["attention"]["out"]["kernel"]) + p["attention"]["out"]["bias"]
    h = layer_norm(x, p["mlp_norm"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    return x + h / (1 + np.exp(-1.702 * h)) @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


def blocks(x, stacked, *, causal):
    for i in range(len(stacked["mlp"]["up"]["bias"])):
        x = block(x, jax.tree.map(lambda a, i=i: a[i], stacked), causal=causal)
    return x


def image_oracle(p, images):
    side = p["patch_embed"]["kernel"].shape[0]
    corners = range(0, images.shape[1], side)
    patches = [images[:, top : top + side, left : left + side] for top in corners for left in corners]
    embedded = [np.einsum("bhwc,hwcd->bd", patch, p["patch_embed"]["kernel"]) for patch in patches]
    first = np.broadcast_to(p["class_embedding"], embedded[0].shape)
    x = np.stack([first, *embedded], axis=1) + p["positional_embedding"]
    x = blocks(layer_norm(x, p["pre_norm"]), p["blocks"], causal=False)
    return layer_norm(x[:, 0], p["post_norm"]) @ p["projection"]


def text_oracle(p, tokens):
    x = p["token_embedding"][tokens] + p["positional_embedding"]
    x = blocks(x, p["blocks"], causal=True)
    return layer_norm(x[np.arange(len(tokens)), (tokens == EOT).argmax(1)], p["post_norm"]) @ p["projection"]


def features(definition: Definition, params, images, tokens):
    @jax.jit
    def encode(params, images, tokens):
        model = definition.bind(Weights(params, {}))
        return model.encode_image(images), model.encode_text(tokens)

    return encode(params, images, tokens)


@pytest.fixture(scope="module")
def truth(params, images, tokens):
    """The features of both towers."""
    wide = jax.tree.map(np.float64, params)
    return image_oracle(wide["image"], np.float64(images)), text_oracle(wide["text"], np.asarray(tokens))


def test_towers_equal_numpy_in_float64(x64, params, images, tokens, truth):
    for found, expected in zip(
        features(DEFINITION.computed(dtype="float64"), params, images, tokens), truth, strict=True
    ):
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())


def test_towers_in_float32_are_within_1e_5_of_numpy(params, images, tokens, truth):
    for found, expected in zip(features(DEFINITION, params, images, tokens), truth, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_logits_and_gradients(params, images, tokens, truth):
    definition = DEFINITION.computed(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(definition.shapes().params)} == {jnp.dtype("float32")}
    for found, expected in zip(features(definition, params, images, tokens), truth, strict=True):
        assert found.dtype == jnp.bfloat16
        # Every one of the residual stream's sums, two a block, rounds to 8 bits.
        np.testing.assert_allclose(found, expected, atol=8 * 2**-8 * np.abs(expected).max())
    per_image, _ = jax.eval_shape(lambda *inputs: definition.bind(Weights(params, {}))(*inputs), images, tokens)
    assert per_image.dtype == jnp.float32
    gradients = jax.eval_shape(jax.grad(loss_of(definition)), params, images, tokens)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


# --- text: the EOT and what is behind it ---


def test_text_features_do_not_change_when_the_batch_is_cut_to_its_longest_caption(x64, params, tokens):
    encode = jax.jit(DEFINITION.computed(dtype="float64").bind(Weights(params, {})).encode_text)
    np.testing.assert_allclose(encode(tokens[:3, :7]), encode(tokens[:3]), rtol=0, atol=1e-12)


def test_text_features_do_not_depend_on_what_stands_after_the_eot(params, tokens):
    encode = jax.jit(DEFINITION.bind(Weights(params, {})).encode_text)
    scribbled = np.array(tokens)
    behind = np.arange(tokens.shape[1]) > np.argmax(tokens, axis=1, keepdims=True)
    scribbled[behind] = np.random.default_rng(3).integers(0, EOT + 1, behind.sum())  # some of them EOT, too
    assert (scribbled != tokens).any()
    np.testing.assert_array_equal(encode(jnp.asarray(scribbled)), encode(tokens))


# --- logits ---


def test_logits_are_scaled_cosines_both_ways(params, images, tokens, truth):
    per_image, per_text = jax.jit(DEFINITION.bind(Weights(params, {})).__call__)(images, tokens)
    img, txt = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in truth)
    scale = np.exp(np.float64(params["logit_scale"]))
    np.testing.assert_allclose(per_image, scale * img @ txt.T, atol=1e-5 * scale)
    np.testing.assert_array_equal(per_text, per_image.T)


def test_normalised_pixels_are_the_formula_and_float32():
    preprocess = Preprocess()
    pixels = np.random.default_rng(4).integers(0, 256, (2, 5, 5, 3), np.uint8)
    found = normalise_pixels(jnp.asarray(pixels), preprocess)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (pixels / 255 - preprocess.mean) / preprocess.std, atol=1e-6)


@pytest.mark.parametrize(("stored", "kept"), [(5.0, LOGIT_SCALE_MAX), (-3.0, -3.0), (2.6, 2.6)])
def test_constrain_limits_the_stored_logit_scale_from_above_and_touches_nothing_else(params, stored, kept):
    found = constrain(params | {"logit_scale": jnp.float32(stored)})
    np.testing.assert_allclose(found["logit_scale"], np.float32(kept), rtol=0)
    assert all(found[tower] is params[tower] for tower in ("image", "text"))


# --- the scan and rematerialisation ---


def loss_of(definition: Definition):
    def loss(params, images, tokens):
        model = definition.bind(Weights(params, {}))
        img, txt = l2_normalise(model.encode_image(images)), l2_normalise(model.encode_text(tokens))
        return losses.softmax(img, txt, scale=model.scale(), valid_B=jnp.ones(len(images), bool)).loss

    return loss


def test_the_program_is_as_long_for_7_blocks_as_for_2(images, tokens):
    def lines(depth: int) -> int:
        arch = dataclasses.replace(ARCH, image=dataclasses.replace(ARCH.image, depth=depth))
        definition = Definition(arch)
        program = str(jax.make_jaxpr(loss_of(definition))(definition.shapes().params, images, tokens))
        assert re.findall(r"\blength=(\d+)", program) == [str(depth), str(ARCH.text.depth)]
        return program.count("\n")

    assert lines(2) == lines(7)


def test_remat_policies_give_equal_gradients_and_each_keeps_less_than_the_one_before(x64, params, images):
    wide = jax.tree.map(jnp.float64, params)
    gradients, memory = {}, {}
    for remat in REMAT:
        definition = DEFINITION.computed(dtype="float64", remat=remat)
        gradient = jax.grad(lambda params, d=definition: (d.bind(Weights(params, {})).encode_image(images) ** 2).sum())
        compiled = jax.jit(gradient).lower(wide).compile()
        gradients[remat], memory[remat] = compiled(wide), compiled.memory_analysis().temp_size_in_bytes
    assert memory["full"] < memory["attention"] < memory["dots"] < memory["none"]
    for remat in REMAT:
        for found, expected in zip(*map(jax.tree.leaves, (gradients[remat], gradients["none"])), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# --- on a mesh whose devices split weights ---


@pytest.mark.full
def test_rows_stay_apart_where_weights_are_split_and_the_gradients_are_the_same(x64, params, images, tokens):
    wide = jax.tree.map(jnp.float64, params)
    images, tokens = (jnp.tile(x, (4,) + (1,) * (x.ndim - 1)) for x in (images, tokens))
    mesh = make_mesh(MeshConfig(2, 4, 1))
    rows = NamedSharding(mesh, BATCH)
    specs = parameter_specs(params)
    split = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), wide, specs)
    inputs = jax.device_put((images, tokens), rows)
    definition = DEFINITION.computed(dtype="float64")
    gradient = jax.jit(jax.grad(loss_of(definition.computed(rows=rows)))).lower(split, *inputs).compile()
    hidden = f"{ARCH.image.num_patches},{ARCH.image.mlp_dim}]"  # of an MLP: [B, P, F]
    assert f"f64[{len(images) // 8},{hidden}" in gradient.as_text()
    assert f"f64[{len(images) // 2},{hidden}" not in gradient.as_text()  # rows of all that share a batch of `data`
    expected = jax.jit(jax.grad(loss_of(definition)))(wide, images, tokens)
    for x, y in zip(*map(jax.tree.leaves, (gradient(split, *inputs), expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * max(1, np.abs(y).max()))


# --- how parameters start ---

WIDE = Architecture(
    embed_dim=96,
    image=ViTTower(image_size=32, patch_size=8, width=128, depth=2, num_heads=2, mlp_dim=512),
    text=TextTower(context_length=24, vocab_size=400, width=192, depth=3, num_heads=3, mlp_dim=768),
)


@pytest.fixture(scope="module")
def start():
    """Every parameter of a new model by path, in float64."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.jit(Definition(WIDE).init)(jax.random.key(5)).params)
    return {path_of(keys): np.float64(x) for keys, x in leaves}


def expected_deviations() -> dict[str, float]:
    """Returns the standard deviation that each parameter starts with; U(-a, a) has a/√3."""
    (w, depth), uniform = (WIDE.text.width, WIDE.text.depth), 3**-0.5
    text = {
        "token_embedding": 0.02,
        "positional_embedding": 0.01,
        "projection": w**-0.5,
        "blocks/attention/qkv/kernel": w**-0.5,
        "blocks/attention/out/kernel": w**-0.5 * (2 * depth) ** -0.5,
        "blocks/mlp/up/kernel": (2 * w) ** -0.5,
        "blocks/mlp/up/bias": w**-0.5 * uniform,
        "blocks/mlp/down/kernel": w**-0.5 * (2 * depth) ** -0.5,
        "blocks/mlp/down/bias": (4 * w) ** -0.5 * uniform,
    }
    w = WIDE.image.width
    image = {
        "patch_embed/kernel": (3 * 8 * 8) ** -0.5 * uniform,
        "class_embedding": w**-0.5,
        "positional_embedding": w**-0.5,
        "projection": w**-0.5,
        "blocks/attention/qkv/kernel": (6 / (4 * w)) ** 0.5 * uniform,
        "blocks/attention/out/kernel": w**-0.5 * uniform,
        "blocks/mlp/up/kernel": w**-0.5 * uniform,
        "blocks/mlp/up/bias": w**-0.5 * uniform,
        "blocks/mlp/down/kernel": (4 * w) ** -0.5 * uniform,
        "blocks/mlp/down/bias": (4 * w) ** -0.5 * uniform,
    }
    return {f"text/{name}": std for name, std in text.items()} | {f"image/{name}": std for name, std in image.items()}


def assert_std(found: np.ndarray, expected: float, *, samples: float, what: str) -> None:
    """Checks a deviation measured on n samples, which itself has a relative one of (2n)^-½: five of those pass."""
    assert abs(found.std() / expected - 1) < 5 * (2 * samples) ** -0.5, f"{what}: {found.std()} instead of {expected}"


def test_parameters_start_with_openais_deviations_and_all_others_constant(start):
    drawn = expected_deviations()
    assert drawn.keys() <= start.keys()
    for path, x in start.items():
        if path in drawn:
            assert_std(x, drawn[path], samples=x.size, what=path)
            assert abs(x.mean()) < 5 * drawn[path] * x.size**-0.5, path
        elif path == "logit_scale":
            np.testing.assert_allclose(x, np.log(1 / 0.07), rtol=1e-6)
        else:
            assert path.endswith(("scale", "bias")), path
            assert (x == path.endswith("scale")).all(), path


def test_blocks_of_a_stack_and_the_towers_are_drawn_apart(start):
    kernels = [*start["image/blocks/mlp/up/kernel"], *start["text/blocks/mlp/up/kernel"][:, :128, :512]]
    correlations = np.corrcoef([kernel.ravel() for kernel in kernels])
    assert np.abs(correlations - np.eye(len(kernels))).max() < 5 * kernels[0].size ** -0.5


# OpenAI's name of a parameter of block i → ours
BLOCK_NAMES = {
    "attn.in_proj_weight": "attention/qkv/kernel",
    "attn.in_proj_bias": "attention/qkv/bias",
    "attn.out_proj.weight": "attention/out/kernel",
    "attn.out_proj.bias": "attention/out/bias",
    "ln_1.weight": "attention_norm/scale",
    "ln_1.bias": "attention_norm/bias",
    "mlp.c_fc.weight": "mlp/up/kernel",
    "mlp.c_fc.bias": "mlp/up/bias",
    "mlp.c_proj.weight": "mlp/down/kernel",
    "mlp.c_proj.bias": "mlp/down/bias",
    "ln_2.weight": "mlp_norm/scale",
    "ln_2.bias": "mlp_norm/bias",
}
NAMES = {
    "logit_scale": "logit_scale",
    "text_projection": "text/projection",
    "positional_embedding": "text/positional_embedding",
    "token_embedding.weight": "text/token_embedding",
    "ln_final.weight": "text/post_norm/scale",
    "ln_final.bias": "text/post_norm/bias",
    "visual.proj": "image/projection",
    "visual.class_embedding": "image/class_embedding",
    "visual.positional_embedding": "image/positional_embedding",
    "visual.conv1.weight": "image/patch_embed/kernel",
    "visual.ln_pre.weight": "image/pre_norm/scale",
    "visual.ln_pre.bias": "image/pre_norm/bias",
    "visual.ln_post.weight": "image/post_norm/scale",
    "visual.ln_post.bias": "image/post_norm/bias",
}


def ours(start: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Returns our parameter for one of OpenAI's."""
    if name in NAMES:
        return start[NAMES[name]]
    tower, i, rest = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.*)", name).groups()
    return start[f"{'image' if tower else 'text'}/blocks/{BLOCK_NAMES[rest]}"][int(i)]


def test_every_parameter_starts_as_openais_own_does(start):
    clip = openai_clip()
    image, text = WIDE.image, WIDE.text
    model = clip.model.CLIP(
        *(WIDE.embed_dim, image.image_size, image.depth, image.width, image.patch_size),
        *(text.context_length, text.vocab_size, text.width, text.num_heads, text.depth),
    )
    theirs = {name: x.detach().numpy().astype(np.float64) for name, x in model.named_parameters()}
    assert sum(x.size for x in theirs.values()) == sum(x.size for x in start.values())
    for name, expected in theirs.items():
        found = ours(start, name)
        assert found.size == expected.size, name
        if expected.std() == 0:
            np.testing.assert_allclose(found, expected.ravel()[0], rtol=1e-6, err_msg=name)
        else:
            assert_std(found, expected.std(), samples=found.size / 2, what=name)  # both are measured
