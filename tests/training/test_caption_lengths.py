"""Texts computed up to the longest caption of a batch: the same training, by the length that all devices choose."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_loop import small_config

from clip_jax import losses, optim, sharding
from clip_jax.config import Config, LossConfig, MeshConfig, ModelConfig, OptimConfig, Steps
from clip_jax.errors import UserError
from clip_jax.models.clip import Definition
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import VARIANTS
from clip_jax.training.loop import train
from clip_jax.training.program import assemble
from clip_jax.training.state import TrainState, abstract_state, initial_state
from clip_jax.training.step import make_train_step
from clip_jax.training.step_lines import read_lines
from clip_jax.training.usage import Usage
from clip_jax.typing import Batch

ARCHITECTURE = VARIANTS["ViT-W64/4@16px"]
LENGTHS = (4, 8)  # of a context of 16
LONGEST = {4: 4, 5: 8, 8: 8, 9: 16, 16: 16, 1: 4}  # of a batch's captions: the length that is computed
SIZE = 16


def batch_of(longest: int) -> Batch:
    """Returns pairs of which one, at another place each time, has the longest caption; one is not valid."""
    random = np.random.default_rng(longest)
    tokens = np.zeros((SIZE, ARCHITECTURE.text.context_length), np.int32)
    for row in tokens:
        length = random.integers(1, longest + 1)
        row[:length] = [*random.integers(1, 900, length - 1), 49407]
    tokens[longest % SIZE, :longest] = [*random.integers(1, 900, longest - 1), 49407]
    valid = np.arange(SIZE) != SIZE - 1
    tokens[~valid] = 0
    return Batch(random.integers(0, 256, (SIZE, 16, 16, 3), np.uint8), tokens, valid)


def trained(sizes: tuple[int, int, int], lengths: tuple[int, ...], parts: int) -> tuple[TrainState, list[dict]]:
    """Returns the state after a batch of each kind, and what the steps said."""
    definition = Definition(ARCHITECTURE, Compute(dtype="float64"))
    optimizer = optim.make(OptimConfig(learning_rate=1e-2, warmup="0 steps"), definition.shapes().params, Steps(10, 0))
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    abstract = abstract_state(definition, optimizer, mesh)
    state = initial_state(definition, optimizer, abstract, seed=0)
    ring = losses.ring_for(LossConfig(form="ring"), mesh, sharding.BATCH_AXES, SIZE)
    step, said = make_train_step(definition, optimizer, abstract, ring=ring, parts=parts, compiled_lengths=lengths), []
    for longest in LONGEST:
        state, metrics = step(state, sharding.to_mesh(batch_of(longest), SIZE, mesh))
        said.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    return jax.device_get(state), said


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "parts"), [((1, 1, 1), 1), *[(sizes, parts) for sizes in ((2, 2, 2), (8, 1, 1)) for parts in (1, 2)]]
)
def test_losses_and_weights_are_those_of_the_whole_context(sizes, parts, x64):
    whole, expected = trained((1, 1, 1), (), 1)
    found, said = trained(sizes, LENGTHS, parts)
    assert [int(one["text_length"]) for one in said] == list(LONGEST.values())
    for one, other in zip(said, expected, strict=True):
        assert "text_length" not in other
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-10)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-9)
    # Adam divides by what may be as small as its epsilon of 1e-6: a difference of 1e-16 there is one of 1e-12 here.
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-9)


def test_what_counts_as_computed_is_the_part_of_the_texts_that_was():
    program = assemble(Config(model=ModelConfig(caption_lengths="24;48")))
    assert (
        "texts: up to the first of 24, 48, 77 tokens that holds the longest caption of a batch" in program.described()
    )
    usage, whole = Usage.of(program), Usage.of(assemble(Config()))
    assert usage.flops == whole.flops == usage.by_length[77]
    short = Usage.of(assemble(Config(model=ModelConfig(context_length=24)))).flops
    assert usage.by_length[24] == short < usage.by_length[48] < usage.flops
    chips = Usage("NVIDIA H200", 1, usage.flops, usage.forward, [], usage.by_length)
    mfu = [chips.scalars(1000.0, lengths)["mfu"] for lengths in ((), (77,), (24, 77))]
    assert mfu[0] == mfu[1]
    assert mfu[2] == pytest.approx(mfu[0] * (1 + short / usage.flops) / 2)


def test_a_run_says_how_long_texts_were_and_goes_on_with_other_lengths(data_dir, tmp_path):
    config = small_config(data_dir, duration="4 steps", checkpoint_every=2)
    train(config, tmp_path / "whole", devices=jax.devices()[:1])
    for lengths, until in (("12", "2 steps"), ("10;14", "4 steps")):
        cut = dataclasses.replace(config, model=dataclasses.replace(config.model, caption_lengths=lengths))
        stopped = functools.partial(lambda until, step: step == until, int(until[0]))
        train(cut, tmp_path / "cut", devices=jax.devices()[:1], preempted=stopped)
    whole, found = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [line["text_length"] for line in found] == [12, 12, 10, 10]
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for one, other in zip(found, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert "text_length" not in other


def test_lengths_are_measured_by_the_context_that_the_config_asks_for():
    program = assemble(Config(model=ModelConfig(context_length=128, caption_lengths="96")))
    assert Usage.of(program).by_length.keys() == {96, 128}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caption_lengths": "24;77"}, r"model.caption_lengths='24;77': .*context length of 77"),
        ({"caption_lengths": "24", "variant": "ViT-B-16-SigLIP"}, "'24': this text tower reads all of its context"),
        ({"caption_lengths": "48;24"}, "'48;24' must rise"),
        ({"caption_lengths": "24;24"}, "'24;24' must rise"),
        ({"caption_lengths": "24,48"}, "'24,48' should be numbers of tokens, such as '24;48'"),
        ({"caption_lengths": "0"}, "'0' should be numbers"),
    ],
)
def test_lengths_that_cannot_be_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        assemble(Config(model=ModelConfig(**changes)))
