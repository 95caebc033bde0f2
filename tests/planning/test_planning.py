"""Plans end to end: compiled here for chips that are elsewhere, told as a table and as JSON."""

import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import rich.console
from plans import CHIPS, FakeCompiler

from clip_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from clip_jax.errors import UserError
from clip_jax.planning import compiler, growth, plan, report, search, table, topology
from clip_jax.planning.topology import GiB

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
SMALL = ("--config=configs/quickstart.py", "--topology=v5e:2x2", "--config.data.global_batch=64")


def run(*args: str, module: str = "clip_jax.planning", code: int = 0) -> subprocess.CompletedProcess:
    """Runs a module as a user does."""
    done = subprocess.run([sys.executable, "-m", module, *args], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def fake() -> FakeCompiler:
    return FakeCompiler(pair=480 * 2**20)


def config_of(rows: int, **model) -> Config:
    return Config(model=ModelConfig(**model), data=DataConfig(global_batch=rows * CHIPS))


def told(made: plan.Plan) -> str:
    console = rich.console.Console(file=io.StringIO(), width=120)
    report.show(made, console)
    return console.file.getvalue()


@needs_libtpu
def test_a_plan_says_on_the_command_line_what_a_small_run_takes():
    done = run(*SMALL, "--json")
    made = plan.Plan.from_json(json.loads(done.stdout)["plan"])
    memory, sizes = made.memory, 3_419_714  # parameters of the model
    assert made.fits
    assert (made.chips, made.rows, made.mesh) == (4, 16, {"data": 4, "fsdp": 1, "tensor": 1})
    assert memory.parameters == pytest.approx(4 * sizes, rel=0.01)
    assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=1e-4)
    assert memory.batch == 16 * (16 * 16 * 3 + 16 * 4 + 1)
    assert memory.parameters + memory.optimizer + memory.batch + memory.temporaries == memory.used < 100 * 2**20
    # What is summed up over the chips is at least the gradients, which are there once in float32 or less.
    reduced = sum(one.bytes for one in made.collectives if one.kind == "all-reduce")
    assert memory.parameters / 2 < reduced < 1.5 * memory.parameters
    assert 1e-5 < made.step.seconds < 1e-2
    assert made.step.pairs_per_second == pytest.approx(64 / made.step.seconds)
    assert 0 < made.step.mfu < 0.1
    assert "fits: " in done.stderr


@needs_libtpu
def test_growth_prints_a_row_for_every_size():
    done = run("--batches=128,256", "--chips=8", module="clip_jax.planning.growth")
    _, _, *rows = done.stdout.splitlines()
    assert [row.split(" | ")[:4] for row in rows] == [["| 128", "8", "16", "dense"], ["| 256", "8", "32", "dense"]]
    _, _, line = run("--batches=128", "--chips=8", "--form=ring", module="clip_jax.planning.growth").stdout.splitlines()
    assert line.startswith("| 128 | 8 | 16 | ring |")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--topology=v5e:2x2"], ["--config is missing"]),
        (["--config=configs/quickstart.py"], ["--topology is missing"]),
        (["--config=configs/quickstart.py", "--topology=v5e:3x3"], ["v5e:3x3", "v5e:2x2"]),
        ([*SMALL, "--config.optim.learning_rat=1"], ["learning_rat", "'optim.learning_rate'"]),
        pytest.param([*SMALL, "--config.data.global_batch=63"], ["63", "4 devices", "60"], marks=needs_libtpu),
        pytest.param([*SMALL, "--config.mesh.fsdp=3"], ["3", "4 devices"], marks=needs_libtpu),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args, words):
    said = run(*args, code=2).stderr
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--generation=v5x"], ["v5x", "v4, v5e, v5p, v6e"]),
        (["--chips=7"], ["7 chips", "4, 8, 16"]),
        (["--batches=1e6"], ["--batches=1e6", "whole numbers"]),
        (["--batches=100", "--chips=8"], ["100", "8 chips"]),
        (["--towers_mfu=0"], ["--towers_mfu=0"]),
        (["--loss=hinge"], ["hinge"]),
    ],
)
def test_a_mistake_about_growth_is_one_line_and_exit_code_2(args, words):
    said = run(*args, module="clip_jax.planning.growth", code=2).stderr
    assert said.startswith("error: ")
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("args", "pair", "words"),
    [
        ((), 250, "it fits with --config.model.remat=attention"),
        ((), 1000, "it fits with --config.model.remat=full"),
        ((), 20_000, "it fits with --config.model.remat=full --config.mesh.data=1 --config.mesh.fsdp=16"),
        ((), 200_000, "tried, and still too large: --config.model.remat=full --config.mesh.data=1"),
        (("--find_batch",), 250, "the largest batch that fits: 7"),
        (("--find_batch",), 20_000, "no batch fits: leave --find_batch out"),
    ],
)
def test_what_could_be_changed_is_said(args, pair, words):
    """With plans that no compiler has made."""
    code = f"""
import sys
sys.path.insert(0, "tests/planning")
from clip_jax import command
from clip_jax.planning import __main__, plan
from plans import FakeCompiler
compiler = FakeCompiler(pair={pair} * 2**20)
plan.make_plan = lambda config, place: compiler(config)
command.run(__main__.main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *SMALL[:2], "--config.data.global_batch=1024", *args],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 900},
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@pytest.mark.parametrize(("rows", "fits"), [(4, True), (64, False)])
def test_a_plan_comes_back_from_json_as_it_was(fake, rows, fits):
    made = fake(config_of(rows))
    assert made.fits is fits
    assert plan.Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_json_has_the_plan_what_was_tried_and_what_was_found(fake):
    config = config_of(64)
    first = fake(config)
    tried = list(search.remedies(config, first, fake))
    batches = list(search.find_batch(config, first, fake))
    said = json.loads(report.as_json(first, tried, batches, search.largest(batches)))
    assert (said["plan"]["fits"], said["plan"]["spare"] < 0, said["plan"]["pairs_per_chip"]) == (False, True, 64)
    assert [one["changes"] for one in said["remedies"]] == [{"model.remat": "attention"}, {"model.remat": "full"}]
    assert [one["plan"]["fits"] for one in said["remedies"]] == [False, True]
    assert said["find_batch"]["largest"] in said["find_batch"]["tried"]


def test_the_table_says_that_it_fits_by_how_much_and_that_times_are_estimates(fake):
    said = told(fake(config_of(4)))
    for words in ("fits:", "to spare", "parameters", "optimizer", "temporaries", "2 ms", "estimate", "25.0 %", "24"):
        assert words in said


def test_the_table_says_that_it_does_not_fit_and_by_how_much(fake):
    said = told(fake(config_of(64)))
    assert "does not fit: 33.00 GiB needed, 15.75 GiB there, 17.25 GiB too much" in " ".join(said.split()), said
    assert "pairs/s" not in said


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (34.23G) exceeds available HBM (15.75G). HLO module: jit_f.", (34.23, 15.75)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.08G of 15.75G hbm. Exceeded hbm capacity "
         "by 4.33G.", (20.08, 15.75)),
        ("RESOURCE_EXHAUSTED: Used 1.50T of 512.00M hbm.", (1536, 0.5)),
    ],
)  # fmt: skip
def test_by_how_much_it_does_not_fit_is_in_the_compilers_refusal(words, sizes):
    refusal = compiler.too_large(jax.errors.JaxRuntimeError(words))
    assert (refusal.used, refusal.limit) == tuple(int(size * GiB) for size in sizes)


def test_another_error_of_the_compiler_is_not_taken_for_a_refusal():
    error = jax.errors.JaxRuntimeError("INTERNAL: something broke")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something broke"):
        compiler.too_large(error)


def test_bytes_on_a_chip_are_those_of_its_shard():
    mesh = plan.assemble(Config(model=ModelConfig(variant="ViT-W64/4@16px"), mesh=MeshConfig(data=2, fsdp=4))).mesh
    spec = jax.sharding.PartitionSpec(("data", "fsdp"))
    x = jax.ShapeDtypeStruct((16, 3), "float32", sharding=jax.sharding.NamedSharding(mesh, spec))
    assert plan.on_a_chip({"x": x}) == 2 * 3 * 4


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Hardware: v5e:16x16, a pod.", "v5e:16x16"),
        ("Hardware: a TPU slice v5p:8x8x8.", "v5p:8x8x8"),
        ("Hardware: 2 CPU cores.", None),
        ("Like v5e:2x2, but not said in the line.", None),
    ],
)
def test_the_slice_of_a_config_is_in_its_header(header, name, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f'"""A run.\n\n{header}\nTime: long.\n"""\n')
    found = table.slice_of(file)
    assert (found and found.name) == name


def test_a_config_for_a_slice_that_is_none_is_refused_by_its_name(tmp_path):
    (tmp_path / "mine.py").write_text('"""Hardware: v5e:3x3."""\n'.replace('"""Hardware', '"""A run.\n\nHardware'))
    with pytest.raises(UserError, match=r"mine\.py: .*v5e:3x3"):
        table.slice_of(tmp_path / "mine.py")


def test_a_new_table_takes_the_place_between_the_marks_and_nothing_else(fake):
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    row = report.markdown_row(fake(config_of(4)), "mine")
    written = table.between_marks(text, row, "x.md")
    assert written == f"before\n{table.BEGIN}\n{row}\n{table.END}\nafter\n"
    assert row.count("|") == report.MARKDOWN_HEAD.splitlines()[0].count("|")
    with pytest.raises(UserError, match=r"x\.md"):
        table.between_marks("no marks", row, "x.md")


def test_the_row_of_what_does_not_fit_says_so_and_has_as_many_cells(fake):
    row = report.markdown_row(fake(config_of(64)), "mine")
    assert "does not fit" in row
    assert row.count("|") == report.MARKDOWN_HEAD.splitlines()[0].count("|")


def test_the_ring_on_paper_grows_with_the_square_of_the_batch_and_its_memory_with_the_batch():
    place = topology.parse("v5e:2x4")
    (seconds, size), (more_seconds, more) = (growth.on_paper(place, batch, 768, ring=True) for batch in (4096, 8192))
    assert (more_seconds / seconds, more / size) == (4, 2)
    dense_seconds, dense_size = growth.on_paper(place, 4096, 768, ring=False)
    assert dense_seconds < seconds
    assert dense_size > size


@needs_libtpu
@pytest.mark.full
def test_what_does_not_fit_is_made_to_on_the_command_line():
    many = [*SMALL[:2], f"--config.data.global_batch={2**17}", "--config.loss.form=ring", "--json"]
    said = json.loads(run(*many).stdout)
    assert not said["plan"]["fits"]
    assert said["remedies"][-1]["plan"]["fits"]


@needs_libtpu
@pytest.mark.full
@pytest.mark.parametrize(
    ("config", "place", "batch", "memory", "seconds"),
    [
        ("openai_vit_l14", "v5e:16x16", 32_768, 11e9, 1.3),
        ("laion_vit_bigg14", "v5p:8x8x8", 163_840, 95 * GiB, math.inf),
    ],
)
def test_large_recipes_fit_their_pods_and_a_step_takes_no_longer_than_it_should(config, place, batch, memory, seconds):
    run_of = (f"--config=configs/{config}.py", f"--topology={place}", "--noremedies", "--json")
    made = plan.Plan.from_json(json.loads(run(*run_of).stdout)["plan"])
    assert made.global_batch == batch
    assert made.fits
    assert made.memory.used <= memory
    assert made.step.seconds <= seconds
