"""The largest batch is found in a few compilations, and what does not fit is made to, at the least cost."""

import pytest
from plans import CHIPS, FakeCompiler

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from clip_jax.errors import UserError
from clip_jax.planning import search
from clip_jax.planning.topology import GENERATIONS, GiB

LIMIT = GENERATIONS["v5e"].memory


def config(rows: int = 64, *, remat: str = "none", microbatch: int | None = None, fsdp: int = 1) -> Config:
    return Config(
        model=ModelConfig(remat=remat),
        data=DataConfig(global_batch=rows * CHIPS),
        mesh=MeshConfig(fsdp=fsdp),
        microbatch=microbatch,
    )


def found(compiler: FakeCompiler, start: Config):
    return search.largest(list(search.find_batch(start, compiler(start), compiler)))


@pytest.mark.parametrize("rows", [8, 64, 200, 1024, 5000])
@pytest.mark.parametrize("pair", [100 * 2**20, 12.3 * 2**20, 2**20])
@pytest.mark.parametrize("bend", [float("inf"), 96, 700])
def test_the_largest_batch_is_found_within_3_percent_in_at_most_9_compilations(rows, pair, bend):
    compiler = FakeCompiler(pair=pair, bend=bend)
    best = found(compiler, config(rows))
    assert best.fits
    assert len(compiler.asked) <= 9, [c.data.global_batch // CHIPS for c in compiler.asked]
    larger = config(best.rows + max(8, int(best.rows * search.CLOSE) + 1))
    assert not compiler(larger).fits


def test_no_batch_is_compiled_twice():
    compiler = FakeCompiler(pair=12.3 * 2**20, bend=96)
    found(compiler, config())
    asked = [c.data.global_batch for c in compiler.asked]
    assert len(asked) == len(set(asked))


def test_a_tile_of_the_loss_is_no_bound_of_the_batch():
    compiler, start = FakeCompiler(pair=400 * 2**20), search.with_changes(config(), {"loss.tile": 64})
    assert found(compiler, start).rows < 64
    assert {asked.loss.tile for asked in compiler.asked[1:]} == {None}


def test_where_no_batch_fits_none_is_found():
    compiler = FakeCompiler(pair=2**20, state=6 * GiB)
    assert found(compiler, config()) is None
    assert compiler.asked[-1].data.global_batch == 8 * CHIPS


def test_a_microbatch_stays_and_always_divides_the_batch():
    compiler = FakeCompiler(pair=2**20)
    start = config(64, microbatch=48 * CHIPS, remat="full")
    start = search.with_changes(start, {"data.global_batch": 96 * CHIPS})
    plans = []
    for plan in search.find_batch(start, compiler(start), compiler):
        plans.append(plan)
        if len(plans) == 4:  # activations do not grow with the batch: it could be doubled for ever
            break
    assert {plan.microbatch for plan in plans} == {48 * CHIPS}
    assert all(plan.global_batch % plan.microbatch == 0 for plan in plans)


def tried(compiler: FakeCompiler, start: Config) -> list[search.Remedy]:
    return list(search.remedies(start, compiler(start), compiler))


def test_activations_that_are_too_large_are_computed_again():
    *before, remedy = tried(FakeCompiler(pair=480 * 2**20), config())
    assert [one.flags() for one in before] == ["--config.model.remat=attention"]
    assert remedy.plan.fits
    assert remedy.flags() == "--config.model.remat=full"


def test_no_more_is_computed_again_than_is_needed():
    (remedy,) = tried(FakeCompiler(pair=250 * 2**20), config())
    assert remedy.plan.fits
    assert remedy.flags() == "--config.model.remat=attention"


def test_parameters_that_are_too_large_are_split_and_the_rest_is_not_compiled_in_vain():
    compiler = FakeCompiler(pair=2**20, state=10 * GiB)
    (remedy,) = tried(compiler, config())
    assert remedy.plan.fits
    assert remedy.plan.mesh["fsdp"] == CHIPS
    assert remedy.plan.remat == "none"
    assert len(compiler.asked) == 2


def test_a_microbatch_comes_last_and_is_as_large_as_it_can_be():
    remedies = tried(FakeCompiler(pair=8 * GiB), config(24))
    *before, last = remedies
    assert [list(remedy.changes) for remedy in before] == [
        ["model.remat"],
        ["model.remat"],
        ["model.remat", "mesh.data", "mesh.fsdp"],
    ]
    assert not any(remedy.plan.fits for remedy in before)
    assert last.plan.fits
    assert last.changes["microbatch"] == 6 * CHIPS  # 7 would fit, and does not divide 24


def test_what_is_already_done_is_not_tried_again():
    remedies = tried(FakeCompiler(pair=2 * GiB), config(64, remat="full", fsdp=CHIPS))
    assert [list(remedy.changes) for remedy in remedies] == [["microbatch"]]


def test_a_microbatch_that_is_too_large_becomes_smaller():
    remedies = tried(FakeCompiler(pair=2 * GiB), config(64, remat="full", fsdp=CHIPS, microbatch=32 * CHIPS))
    assert remedies[-1].plan.fits
    assert remedies[-1].plan.microbatch == 16 * CHIPS


def test_when_nothing_helps_the_last_attempt_is_not_said_to_fit():
    remedies = tried(FakeCompiler(pair=2**20, state=200 * GiB), config())
    assert not any(remedy.plan.fits for remedy in remedies)


def test_parameters_are_split_no_further_than_the_model_can_be():
    def narrow(config: Config):
        if config.mesh.fsdp > 8:
            raise UserError("a width of 1,664 cannot be split")
        return compiler(config)

    compiler = FakeCompiler(pair=2**20, state=10 * GiB)
    (remedy,) = search.remedies(config(), compiler(config()), narrow)
    assert remedy.flags() == "--config.mesh.data=2 --config.mesh.fsdp=8"


def test_changes_go_through_the_configs_rules():
    changed = search.with_changes(config(), {"model.remat": "full", "mesh.fsdp": 4})
    assert (changed.model.remat, changed.mesh.fsdp) == ("full", 4)
    with pytest.raises(ValueError, match="remat"):
        search.with_changes(config(), {"model.remat": "a little"})
