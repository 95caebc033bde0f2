"""WiSE-FT: what lies between two models is between each of their numbers, made one array after the other."""

import dataclasses

import numpy as np
import pytest
from oracles import openai_clip
from test_conversions import RESNET, VIT, drawn

from clip_jax import pretrained
from clip_jax.architecture import Preprocess
from clip_jax.errors import UserError
from clip_jax.pretrained import WiseFT, convert, read
from clip_jax.weights import openai
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.interpolate import interpolate
from clip_jax.weights.streaming import Lazy, specs_of


def moved(bundle: Bundle, **changes) -> Bundle:
    """Returns the bundle with other numbers, in float32, as a run has them."""
    random = np.random.default_rng(1)
    arrays = {}
    for path, x in bundle.arrays.items():
        by = 7 if x.dtype == np.int32 else random.normal(size=x.shape) * 0.1
        arrays[path] = np.asarray(x + by, np.int32 if x.dtype == np.int32 else np.float32)
    return dataclasses.replace(bundle, arrays=arrays, origin="fine-tuned", **changes)


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_each_number_lies_alpha_of_the_way_from_the_zero_shot_to_the_fine_tuned_one(alpha, architecture):
    zero_shot = drawn(architecture)
    fine_tuned = moved(zero_shot)
    found = interpolate(zero_shot, fine_tuned, float(alpha))
    assert found.arrays.keys() == zero_shot.arrays.keys()
    for path, x in found.arrays.items():
        first, second = zero_shot.arrays[path], fine_tuned.arrays[path]
        assert (x.shape, x.dtype) == (specs_of(found.arrays)[path].shape, specs_of(found.arrays)[path].dtype)
        if path.endswith("count"):
            np.testing.assert_array_equal(x, second)
            continue
        expected = (1 - alpha) * np.float64(first) + alpha * np.float64(second)
        assert x.tobytes() == np.float32(expected).tobytes(), path
    assert found.origin == f"{1 - alpha:g} · random + {alpha:g} · fine-tuned"


def test_two_models_in_float16_stay_so_and_the_ends_are_the_models_bit_for_bit():
    zero_shot = drawn(VIT)
    halves = {  # of the numbers; the others are -0
        path: np.where(np.arange(x.size).reshape(x.shape) % 2, x, -0.0).astype(x.dtype)
        for path, x in zero_shot.arrays.items()
    }
    fine_tuned = dataclasses.replace(zero_shot, arrays=halves)
    for alpha, end in ((0.0, zero_shot), (1.0, fine_tuned)):
        for path, x in interpolate(zero_shot, fine_tuned, alpha).arrays.items():
            assert (x.dtype, x.tobytes()) == (end.arrays[path].dtype, end.arrays[path].tobytes()), path
    assert interpolate(zero_shot, fine_tuned, 0.5).arrays["image/projection"].dtype == np.float16


def test_arrays_are_made_when_they_are_asked_for_and_of_their_own_two_alone():
    asked = []

    def lazy(bundle: Bundle) -> Bundle:
        def make(paths):
            asked.extend(paths)
            yield from (bundle.arrays[path] for path in paths)

        return dataclasses.replace(bundle, arrays=Lazy(bundle.arrays, [([path], make) for path in bundle.arrays]))

    found = interpolate(lazy(drawn(VIT)), lazy(moved(drawn(VIT))), 0.5)
    asked.clear()  # the tests' own look at types asks for some
    assert found.arrays["logit_scale"].shape == ()
    assert asked == ["logit_scale", "logit_scale"]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_that_is_not_between_the_two_is_refused(alpha):
    with pytest.raises(UserError, match=r"alpha=.* should be in \[0, 1\]"):
        interpolate(drawn(VIT), drawn(VIT), alpha)


def test_models_that_are_not_one_architecture_are_refused_with_all_that_differs():
    other = dataclasses.replace(
        VIT,
        image=dataclasses.replace(VIT.image, activation="gelu", depth=2),
        preprocess=Preprocess((0.5, 0.5, 0.5), rgb_first=True),
        logit_bias=True,
    )
    words = (
        r"between random and random, the second of which differs: image\.activation is 'gelu', not 'quick_gelu'; "
        r"image\.depth is 2, not 3; logit_bias is True, not False; preprocess\.mean is \(0\.5, 0\.5, 0\.5\), not .*"
        r"tokenizer\.json are not the same"
    )
    zero_shot, fine_tuned = drawn(VIT), drawn(other)
    with pytest.raises(UserError, match=words) as error:
        interpolate(
            dataclasses.replace(zero_shot, tokenizer="{}"), dataclasses.replace(fine_tuned, tokenizer="{ }"), 0.5
        )
    assert "rgb_first" not in str(error.value), "that is a habit of the format"


def test_what_lies_between_is_written_for_others_and_computes_the_same_there(tmp_path, capsys):
    openai_clip()
    openai.write(tmp_path / "zero_shot.pt", drawn(VIT))
    openai.write(tmp_path / "fine_tuned.pt", moved(drawn(VIT)))
    wise_ft = WiseFT(tmp_path / "zero_shot.pt", 0.25)
    ok = convert(tmp_path / "fine_tuned.pt", "openai", tmp_path / "between.pt", wise_ft=wise_ft, check=True)
    assert ok, capsys.readouterr().out
    expected = interpolate(read(tmp_path / "zero_shot.pt"), read(tmp_path / "fine_tuned.pt"), 0.25)
    for path, x in pretrained.read(tmp_path / "between.pt").arrays.items():
        np.testing.assert_array_equal(x, expected.arrays[path])
