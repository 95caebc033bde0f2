"""A table of weights is read both ways, and whatever it does not cover is said at once."""

import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from clip_jax.architecture import Architecture, ResNetTower, TextTower
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition, Weights
from clip_jax.weights.mapping import Rule, export_tensors, flatten, import_tensors, source_shapes, unflatten
from clip_jax.weights.streaming import Lazy

RULES = (
    Rule("scale", "scale", "->"),
    Rule("blocks.{i}.in.weight", "blocks/qkv/kernel[i]", "(T N K) D -> D T N K"),
    Rule("blocks.{i}.mlp.weight", "blocks/mlp/kernel[i]", "F D -> D F"),
    Rule("layer{s}.0.conv", "stage{s}/first/kernel", "F D H W -> H W D F"),
    Rule("layer{s}.{i+1}.conv", "stage{s}/rest/kernel[i]", "F D H W -> H W D F"),
    Rule("layer{s}.{i+1}.seen", "stage{s}/rest/count[i]", "->"),
)
SHAPES = {
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
    "blocks/qkv/kernel": jax.ShapeDtypeStruct((2, 6, 3, 2, 3), jnp.float32),
    "blocks/mlp/kernel": jax.ShapeDtypeStruct((2, 6, 8), jnp.float32),
    "stage1/first/kernel": jax.ShapeDtypeStruct((3, 3, 4, 5), jnp.float32),
    "stage2/first/kernel": jax.ShapeDtypeStruct((3, 3, 5, 7), jnp.float32),
    "stage2/rest/kernel": jax.ShapeDtypeStruct((2, 1, 1, 7, 7), jnp.float32),
    "stage2/rest/count": jax.ShapeDtypeStruct((2,), jnp.int32),
}
THEIRS = {
    "scale": (),
    "blocks.0.in.weight": (18, 6),
    "blocks.1.in.weight": (18, 6),
    "blocks.0.mlp.weight": (8, 6),
    "blocks.1.mlp.weight": (8, 6),
    "layer1.0.conv": (5, 4, 3, 3),
    "layer2.0.conv": (7, 5, 3, 3),
    "layer2.1.conv": (7, 7, 1, 1),
    "layer2.2.conv": (7, 7, 1, 1),
    "layer2.1.seen": (),
    "layer2.2.seen": (),
}


def apart(*places: str) -> list[Rule]:
    """Returns rules for tensors that fill these places of queries, keys and values."""
    patterns = ("(N K) D -> D N K", "(T N K) D -> D T N K")
    return [Rule(f"{{i}}.{x}", f"blocks/qkv/kernel[i, :, {x}]", patterns[":" in x]) for x in places]


def tensors_of(dtype) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: np.array(rng.integers(0, 1000), np.int64)
        if name.endswith("seen")
        else np.asarray(rng.normal(size=shape)).astype(dtype)
        for name, shape in THEIRS.items()
    }


def test_our_shapes_give_the_names_and_shapes_of_theirs():
    assert source_shapes(RULES, SHAPES) == THEIRS


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_what_is_imported_is_exported_bit_for_bit(dtype):
    tensors = tensors_of(dtype)
    arrays = import_tensors(RULES, tensors, SHAPES)
    assert {path: x.shape for path, x in arrays.items()} == {path: like.shape for path, like in SHAPES.items()}
    assert {path: x.dtype for path, x in arrays.items() if path != "stage2/rest/count"} == dict.fromkeys(
        SHAPES.keys() - {"stage2/rest/count"}, np.dtype(dtype)
    )
    assert arrays["stage2/rest/count"].dtype == np.int32
    back = export_tensors(RULES, arrays)
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (back[name].dtype, back[name].shape) == (x.dtype, x.shape)
        assert back[name].tobytes() == x.tobytes()


def test_values_lie_where_a_hand_would_put_them():
    tensors = tensors_of(np.float32)
    arrays = import_tensors(RULES, tensors, SHAPES)
    for i in range(2):
        for d, t, n, k in np.ndindex(6, 3, 2, 3):
            expected = tensors[f"blocks.{i}.in.weight"][t * 6 + n * 3 + k, d]
            assert arrays["blocks/qkv/kernel"][i, d, t, n, k] == expected
        np.testing.assert_array_equal(arrays["blocks/mlp/kernel"][i], tensors[f"blocks.{i}.mlp.weight"].T)
        np.testing.assert_array_equal(
            arrays["stage2/rest/kernel"][i, 0, 0], tensors[f"layer2.{i + 1}.conv"][:, :, 0, 0].T
        )
        assert arrays["stage2/rest/count"][i] == tensors[f"layer2.{i + 1}.seen"]
    for h, w, d, f in np.ndindex(3, 3, 4, 5):
        assert arrays["stage1/first/kernel"][h, w, d, f] == tensors["layer1.0.conv"][f, d, h, w]


def test_a_part_of_an_array_can_come_from_each_of_several_names():
    rules = [Rule("{i}." + letter, f"kernel[i, :, {place}]", "(N K) D -> D N K") for place, letter in enumerate("qkv")]
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 6, 3, 2, 3), jnp.float32)}
    assert source_shapes(rules, shapes) == {f"{i}.{letter}": (6, 6) for letter in "qkv" for i in range(2)}
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape) for name, shape in source_shapes(rules, shapes).items()}
    arrays = import_tensors(rules, tensors, shapes)
    for i, d, t, n, k in np.ndindex(2, 6, 3, 2, 3):
        assert arrays["kernel"][i, d, t, n, k] == tensors[f"{i}.{'qkv'[t]}"][n * 3 + k, d]
    back = export_tensors(rules, arrays)
    assert all(np.array_equal(back[name], x) for name, x in tensors.items())


def test_a_slice_of_an_array_can_come_from_one_name():
    rules = [
        Rule("q.weight", "kernel[:, 0]", "(N K) D -> D N K"),
        Rule("kv.weight", "kernel[:, 1:]", "(T N K) D -> D T N K"),
        Rule("{i}.qk", "blocks/kernel[i, :, :2]", "(T N K) D -> D T N K"),
        Rule("{i}.v", "blocks/kernel[i, :, 2]", "(N K) D -> D N K"),
    ]
    shapes = {
        "kernel": jax.ShapeDtypeStruct((6, 3, 2, 3), jnp.float32),
        "blocks/kernel": jax.ShapeDtypeStruct((2, 6, 3, 2, 3), jnp.float32),
    }
    expected = {"q.weight": (6, 6), "kv.weight": (12, 6)}
    expected |= {f"{i}.{name}": shape for i in range(2) for name, shape in (("qk", (12, 6)), ("v", (6, 6)))}
    assert source_shapes(rules, shapes) == expected
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape) for name, shape in expected.items()}
    arrays = import_tensors(rules, tensors, shapes)
    for d, t, n, k in np.ndindex(6, 3, 2, 3):
        q_kv = tensors["q.weight"] if t == 0 else tensors["kv.weight"][(t - 1) * 6 :]
        assert arrays["kernel"][d, t, n, k] == q_kv[n * 3 + k, d]
        qk_v = tensors["1.v"] if t == 2 else tensors["1.qk"][t * 6 :]
        assert arrays["blocks/kernel"][1, d, t, n, k] == qk_v[n * 3 + k, d]
    back = export_tensors(rules, arrays)
    assert all(np.array_equal(back[name], x) for name, x in tensors.items())


def test_a_scalar_of_theirs_may_be_a_vector_of_one():
    rules = [Rule("scale", "scale", "1 ->"), Rule("{i}.scale", "scales[i]", "1 1 ->"), Rule("p", "p", "1 P D -> P D")]
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in (("scale", ()), ("scales", (2,)))}
    shapes["p"] = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert source_shapes(rules, shapes) == {"scale": (1,), "0.scale": (1, 1), "1.scale": (1, 1), "p": (1, 2, 3)}
    tensors = {name: np.random.rand(*shape) for name, shape in source_shapes(rules, shapes).items()}
    arrays = import_tensors(rules, tensors, shapes)
    assert arrays["scale"].shape == ()
    assert arrays["scale"] == tensors["scale"][0]
    np.testing.assert_array_equal(arrays["scales"], [tensors["0.scale"][0, 0], tensors["1.scale"][0, 0]])
    np.testing.assert_array_equal(arrays["p"], tensors["p"][0])
    back = export_tensors(rules, arrays)
    assert {name: x.tolist() for name, x in back.items()} == {name: x.tolist() for name, x in tensors.items()}


def test_nothing_is_made_before_it_is_asked_for_and_what_was_made_is_not_kept():
    tensors = tensors_of(np.float32)
    arrays = import_tensors(RULES, tensors, SHAPES)
    assert {path: (x.shape, x.dtype) for path, x in arrays.specs.items()} == {
        path: (like.shape, like.dtype) for path, like in SHAPES.items()
    }
    tensors["blocks.1.mlp.weight"][:] = 7  # is seen: nothing was read yet
    made = arrays["blocks/mlp/kernel"]
    assert (made[1] == 7).all()
    gone = weakref.ref(made.base)
    del made
    assert gone() is None
    with pytest.raises(KeyError):
        arrays["blocks"]


def test_each_of_our_arrays_is_made_once_for_all_that_is_cut_out_of_it():
    tensors, asked = tensors_of(np.float32), []
    arrays = import_tensors(RULES, tensors, SHAPES)

    def make(paths):
        asked.extend(paths)
        yield from (arrays[path] for path in paths)

    back = export_tensors(RULES, Lazy(arrays.specs, [([path], make) for path in arrays]))
    assert {name: x.shape for name, x in back.specs.items()} == THEIRS
    pairs = back.items()
    asked.clear()  # beartype has looked at some
    for name, x in pairs:
        np.testing.assert_array_equal(x, tensors[name])
    assert sorted(asked) == sorted(SHAPES)


def test_floats_come_in_the_dtype_asked_for_and_integers_in_ours():
    tensors = tensors_of(np.float16)
    arrays = import_tensors(RULES, tensors, SHAPES, np.float32)
    assert {path: x.dtype for path, x in arrays.items()} == {path: like.dtype for path, like in SHAPES.items()}
    np.testing.assert_array_equal(arrays["blocks/mlp/kernel"][1], tensors["blocks.1.mlp.weight"].T.astype(np.float32))


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [(np.float16, np.float32, np.float32), (np.float16, ml_dtypes.bfloat16, np.float32)],
)
def test_blocks_of_two_dtypes_meet_in_one_that_holds_both(one, other, both):
    tensors = tensors_of(one)
    tensors["blocks.1.mlp.weight"] = tensors["blocks.1.mlp.weight"].astype(other)
    found = import_tensors(RULES, tensors, SHAPES)["blocks/mlp/kernel"]
    assert found.dtype == both
    for i in range(2):
        np.testing.assert_array_equal(found[i], tensors[f"blocks.{i}.mlp.weight"].T.astype(both))


def test_names_are_exported_in_the_order_of_their_numbers():
    shapes = {"kernel": np.zeros((12, 2))}
    assert list(export_tensors([Rule("b.{i}.w", "kernel[i]", "D -> D")], shapes)) == [f"b.{i}.w" for i in range(12)]


def test_one_error_lists_all_that_is_missing_not_known_and_of_another_shape_or_kind():
    tensors = tensors_of(np.float32)
    del tensors["scale"], tensors["layer2.2.conv"]
    tensors |= {"layer2.3.conv": np.zeros((7, 7, 1, 1)), "optimizer.step": np.zeros(())}
    tensors["blocks.0.in.weight"] = np.zeros((6, 18), np.float16)
    tensors["blocks.1.mlp.weight"] = np.zeros((8, 6), np.int32)
    with pytest.raises(UserError) as error:
        import_tensors(RULES, tensors, SHAPES)
    assert str(error.value) == (
        "its tensors do not fit; missing (2): scale, layer2.2.conv; not known (2): layer2.3.conv, optimizer.step; "
        "of another shape or kind (2): blocks.0.in.weight is float16 [6, 18], not float [18, 6], "
        "blocks.1.mlp.weight is int32 [8, 6], not float [8, 6]"
    )


def test_of_many_names_an_error_says_the_first_and_how_many_more():
    tensors = tensors_of(np.float32) | {f"more.{i}": np.zeros(()) for i in range(1000)}
    del tensors["scale"]
    with pytest.raises(
        UserError, match=r"missing \(1\): scale; not known \(1000\): more\.0, .* and 980 more$"
    ) as error:
        import_tensors(RULES, tensors, SHAPES)
    assert str(error.value).count("more.") == 20


@pytest.mark.parametrize(
    ("count", "fits"), [(2**31 - 1, True), (2**31, False), (-(2**31), True), (-(2**31) - 1, False)]
)
def test_a_count_that_ours_cannot_hold_is_refused_and_never_wraps(count, fits):
    tensors = tensors_of(np.float32) | {"layer2.1.seen": np.array(count, np.int64)}
    if fits:
        assert import_tensors(RULES, tensors, SHAPES)["stage2/rest/count"][0] == count
    else:
        with pytest.raises(UserError, match=rf"layer2\.1\.seen has {count}, which int32 cannot hold"):
            import_tensors(RULES, tensors, SHAPES)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (RULES[:-1], "do not fill, or fill twice: stage2/rest/count"),
        ((*RULES, Rule("scale", "scale", "->")), "two rules take the same name"),
        ((*RULES, Rule("temperature", "scale", "->")), "do not fill, or fill twice: scale"),
        ((*RULES[1:], Rule("scale", "scale[i]", "->")), "zip"),
        ((Rule("{i}.q", "blocks/mlp/kernel[i, 0]", "F -> F"), *RULES[:2], *RULES[3:]), "blocks/mlp/kernel"),
        ((*RULES[:1], *apart("0", "1:3", "2"), *RULES[2:]), "fill twice: blocks/qkv/kernel"),
        ((*RULES[:1], *apart("0", "0:2"), *RULES[2:]), "fill twice: blocks/qkv/kernel"),  # as many as there are
    ],
)
def test_a_table_that_does_not_fill_our_arrays_exactly_once_is_our_mistake(rules, words):
    for call in (lambda: source_shapes(rules, SHAPES), lambda: import_tensors(rules, tensors_of(np.float32), SHAPES)):
        with pytest.raises((AssertionError, ValueError), match=words):
            call()


def test_rules_that_match_none_of_our_arrays_are_fine():
    assert source_shapes((*RULES, Rule("head.weight", "head/kernel", "V D -> D V")), SHAPES) == THEIRS


@pytest.mark.parametrize("qkv", [RULES[1:2], apart("0", "1", "2"), apart("0", "1:")], ids=["one", "q k v", "q kv"])
def test_imported_floats_lie_as_in_their_file_and_jax_takes_them_so_without_a_copy(qkv):
    rules = (*RULES[:1], *qkv, *RULES[2:])
    tensors = {name: np.zeros(shape, np.float32) for name, shape in source_shapes(rules, SHAPES).items()}
    tensors = {name: x.astype(np.int64) if name.endswith("seen") else x for name, x in tensors.items()}
    arrays = import_tensors(rules, tensors, SHAPES)
    for path, x in arrays.items():
        assert x.ctypes.data % 64 == 0, path
    kernel = arrays["blocks/qkv/kernel"].transpose(0, 2, 3, 4, 1)  # (T N K) D
    assert kernel.flags.c_contiguous
    assert jax.device_put(kernel, jax.devices()[0]).unsafe_buffer_pointer() == kernel.ctypes.data


def test_weights_are_flattened_by_path_and_put_back_parameters_and_statistics_apart():
    text = TextTower(context_length=8, vocab_size=20, width=64, depth=2, num_heads=1, mlp_dim=256)
    weights = Definition(Architecture(16, ResNetTower(32, 4, (1, 1, 2, 1), 2), text)).shapes()
    flat = flatten(weights)
    assert len(flat) == len(jax.tree.leaves(weights))
    assert {"logit_scale", "text/blocks/mlp/up/kernel", "image/stage3/rest/conv1/norm/mean"} < flat.keys()
    back = unflatten(flat, weights)
    assert isinstance(back, Weights)
    assert back == weights
    assert back.statistics["image"]["stem1"]["norm"]["count"].dtype == jnp.int32
