"""What a config is put together to: whose attention, which form of the loss, and what is said of it."""

from unittest import mock

import jax
import pytest

from clip_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig
from clip_jax.errors import UserError
from clip_jax.models.variants import VARIANTS
from clip_jax.training import program
from clip_jax.training.program import assemble, attention_for

SMALL = "ViT-W64/4@16px"
GPU = mock.Mock(spec=jax.Device, platform="gpu")


@pytest.mark.parametrize("word", ["auto", "xla"])
def test_without_a_gpu_attention_is_xlas_and_nothing_is_said(word):
    assert attention_for(ModelConfig(SMALL, attention=word), VARIANTS[SMALL], jax.devices()[0]) == ("xla", "")


def test_cudnn_without_a_gpu_is_refused():
    with pytest.raises(UserError, match=r"model.attention='cudnn' needs a GPU, and this is a cpu; use 'auto'"):
        attention_for(ModelConfig(SMALL, attention="cudnn"), VARIANTS[SMALL], jax.devices()[0])


def test_on_a_gpu_attention_is_cudnns_where_it_takes_all_towers(monkeypatch):
    asked = []
    monkeypatch.setattr(program, "refused_by_cudnn", lambda shape, **words: asked.append((shape, words["causal"])))
    assert attention_for(ModelConfig("ViT-L/14"), VARIANTS["ViT-L/14"], GPU) == ("cudnn", "")
    assert asked == [((12, 77, 64), True), ((16, 257, 64), False)]
    asked.clear()
    attention_for(ModelConfig("ViT-L/14", patch_dropout=0.5), VARIANTS["ViT-L/14"], GPU)
    assert asked[1][0] == (16, 129, 64), "what is left of 256 patches, and the class token"


def test_a_refusal_of_cudnns_is_told_once_and_is_an_error_for_who_insists(monkeypatch):
    monkeypatch.setattr(program, "refused_by_cudnn", lambda shape, **words: "heads of 88" if shape[2] == 88 else None)
    arch = VARIANTS["ViT-g-14"]
    word, note = attention_for(ModelConfig("ViT-g-14"), arch, GPU)
    assert (word, note) == ("xla", " (cuDNN refuses the image tower: heads of 88)")
    with pytest.raises(UserError, match=r"cuDNN refuses the image tower .heads of 88.; use 'auto' or 'xla'"):
        attention_for(ModelConfig("ViT-g-14", attention="cudnn"), arch, GPU)


def test_cudnn_is_asked_only_about_what_it_may_take():
    assert program.refused_by_cudnn((2, 8, 8), causal=False, dtype="float32", device=GPU) == "it takes no float32"
    reason = program.refused_by_cudnn((2, 8, 8), causal=False, dtype="bfloat16", device=jax.devices()[0])
    assert reason, "there is no cuDNN on a CPU, and it says so"


def test_float64_is_refused_where_jax_would_make_float32_of_it_and_is_float64_throughout_where_not():
    config = Config(model=ModelConfig(SMALL, compute_dtype="float64"), data=DataConfig(global_batch=64))
    with pytest.raises(UserError, match=r"compute_dtype='float64' would be float32 .* JAX_ENABLE_X64=true"):
        assemble(config)
    with jax.enable_x64(True):
        state, metrics = jax.eval_shape((made := assemble(config)).train_step, made.state, made.batch)
    floats = {
        x.dtype.name for x in jax.tree.leaves((state, metrics)) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    }
    assert floats == {"float64"}


def test_what_was_decided_is_said_a_line_each():
    config = Config(
        model=ModelConfig(SMALL, logit_bias=True),
        data=DataConfig(global_batch=64),
        mesh=MeshConfig(2, 2, 2),
        loss=LossConfig(form="ring", tile=4),
        microbatch=16,
    )
    assert assemble(config).described() == [
        "ViT-W64/4@16px, mesh data × fsdp × tensor = 2 × 2 × 2",
        "loss: sigmoid, in a ring of 4 device(s), tiles of 4² logits",
        "attention: xla",
        "towers: 4 parts of 16 pairs, one after the other",
    ]
    config = Config(model=ModelConfig("RN50"), data=DataConfig(global_batch=64), microbatch=16)
    assert assemble(config, jax.devices()[:1]).described() == [
        "RN50, mesh data × fsdp × tensor = 1 × 1 × 1",
        "loss: softmax, dense: all 64² logits at once",
        "attention: xla",
        "towers: 4 parts of 16 pairs, one after the other; batch norm sees each by itself",
    ]
