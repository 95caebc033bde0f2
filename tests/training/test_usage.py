"""What is said of chips: rates, MFU by hand, memory; and the bar that shows it."""

import io
import math
from unittest import mock

import jax
import jax.extend
import pytest
import rich.console

from clip_jax import flops
from clip_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig
from clip_jax.models.variants import VARIANTS
from clip_jax.training.metrics import Progress
from clip_jax.training.program import assemble
from clip_jax.training.usage import Usage

SCALARS = {"loss": 3.1234, "image_to_text_accuracy": 0.4, "text_to_image_accuracy": 0.5, "pairs_per_second": 12_345.6}


def chip(kind: str, memory: dict[str, int] | None) -> jax.Device:
    return mock.Mock(spec=jax.Device, device_kind=kind, memory_stats=lambda: memory)


def test_mfu_is_the_architectures_flop_forward_and_backward_over_the_peak_of_all_chips():
    config = Config(
        model=ModelConfig("ViT-B/32", remat="full"), data=DataConfig(global_batch=1024), loss=LossConfig(form="ring")
    )
    usage = Usage.of(assemble(config))
    # 3 × (8.82 + 5.96) GFLOP but for the gradient of the pixels, and of the loss 3 products of 1024 × 512 a pair: no
    # recomputation, no second cosines
    pixels = 2 * 224**2 * 3 * 768
    assert usage.flops == pytest.approx(3 * (8.82e9 + 5.96e9) - pixels + 3 * 2 * 1024 * 512, rel=1e-3)
    assert usage.forward == pytest.approx(8.82e9 + 5.96e9 + 2 * 1024 * 512, rel=1e-3)
    assert usage.chips == 8
    found = Usage("NVIDIA H200", 8, usage.flops, usage.forward, []).scalars(8 * 5000.0)
    assert found == {"pairs_per_second_per_chip": 5000, "mfu": pytest.approx(5000 * 44.10e9 / 989e12, rel=1e-3)}


def test_patches_that_are_dropped_are_not_counted():
    def counted(dropped: float) -> int:
        return Usage.of(assemble(Config(model=ModelConfig("ViT-B/16", patch_dropout=dropped)))).flops

    assert 0.5 < counted(0.5) / counted(0.0) < 0.6


def test_a_tower_of_which_nothing_is_trained_costs_its_forward_pass_alone():
    def counted(**optim) -> int:
        return Usage.of(assemble(Config(optim=OptimConfig(**optim)))).flops

    image = flops.of_pair(VARIANTS["ViT-B/32"]).image
    pixels, cosines = 2 * 224**2 * 3 * 768, 2 * Config().data.global_batch * 512
    assert counted() - counted(frozen="image/.*") == 2 * image - pixels + cosines


def products(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Returns the FLOP of a program's matrix products, in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((summed, _), _), like = equation.params["dimension_numbers"], equation.invars[0].aval
            total += 2 * equation.outvars[0].aval.size * math.prod(like.shape[dim] for dim in summed)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(products, jax.extend.core.jaxprs_in_params(equation.params)))
    return total


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        pytest.param({}, {}, marks=pytest.mark.full),
        pytest.param({}, {"lock_image": 1}, marks=pytest.mark.full),
        ({}, {"lock_image": 4, "lock_text": 5}),
        ({"lora_rank": 16}, {}),
        pytest.param({"lora_rank": 16}, {"lock_image": 4, "lock_text": 5}, marks=pytest.mark.full),
        pytest.param({}, {"frozen": "image/blocks/mlp/.*;text/.*"}, marks=pytest.mark.full),
    ],
)
def test_a_step_computes_what_is_counted_and_at_most_a_fiftieth_more(model, trained):
    # More: the scores again in the backward pass; what the adapters of the first block's queries, keys, values read.
    config = Config(
        ModelConfig("ViT-B/32", **model), DataConfig(global_batch=8), OptimConfig(**trained), init_from="weights"
    )
    program = assemble(config, jax.devices()[:1])
    computed = products(jax.make_jaxpr(program.train_step)(program.state, program.batch).jaxpr)
    assert 1 < computed / 8 / Usage.of(program).flops < 1.02


def test_memory_is_the_largest_peak_of_this_hosts_chips_and_absent_where_they_do_not_tell():
    stats = [{"peak_bytes_in_use": size, "bytes_in_use": 1} for size in (5, 9, 7)]
    usage = Usage("TPU v5 lite", 6, 10**9, 10**9, [chip("TPU v5 lite", one) for one in stats])
    assert usage.scalars(1.0)["device_memory"] == 9
    assert Usage.of(assemble(Config())).scalars(80.0) == {"pairs_per_second_per_chip": 10}


def test_what_mfu_counts_is_said_and_why_there_is_none():
    usage = Usage("TPU v5 lite", 8, 525_200_000_000, 175_300_000_000, [])
    assert usage.described() == (
        "MFU: analytic, 525.2 GFLOP a pair, 3.00 times its forward pass, "
        "197 TFLOP/s a chip (TPU v5 lite, bfloat16, dense)"
    )
    usage = Usage("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 1, 525_200_000_000, 175_300_000_000, [])
    assert usage.described().startswith("MFU: none, the peak of 'NVIDIA H100 80GB HBM3 MIG 1g.10gb' is not known")
    assert usage.kind not in flops.PEAKS


@pytest.mark.parametrize(
    ("width", "more", "words"),
    [
        (80, {}, "loss 3.1234 · accuracy 45% · 12,346 pairs/s"),
        (100, {"mfu": 0.412}, "loss 3.1234 · accuracy 45% · 12,346 pairs/s · MFU 41%"),
    ],
)
def test_a_bar_has_the_latest_metrics_on_one_line_of_a_terminal(width, more, words):
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=width, color_system=None)
    with Progress(10_000, done=0, console=console) as progress:
        progress.show(1, SCALARS)
        progress.advance(1200)
        progress.show(1200, SCALARS | more)
    line = screen.getvalue().splitlines()[-2].split("\r")[-1]
    assert words in line
    assert "1200/10000" in line
    assert line.strip().endswith("left")


def test_without_a_terminal_a_line_has_the_same():
    screen = io.StringIO()
    with Progress(20, done=0, console=rich.console.Console(file=screen, width=200)) as progress:
        progress.show(1, SCALARS)
        progress.show(20, SCALARS | {"mfu": 0.412})
    assert "step 20/20 · loss 3.1234 · accuracy 45% · 12,346 pairs/s · MFU 41% · 0 s left" in screen.getvalue()
