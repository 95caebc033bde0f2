"""A run measures itself as it goes: as eval.py would, on any mesh, by its averages; and keeps where it was best."""

import json

import jax
import pytest
import shards

from clip_jax import distributed, pretrained, sharding
from clip_jax.config import Config, DataConfig, EvaluationConfig, MeshConfig, ModelConfig, OptimConfig
from clip_jax.data.sources import open_source
from clip_jax.errors import UserError
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.tasks import TASKS
from clip_jax.training.loop import train
from clip_jax.training.step_lines import read_lines

DIGITS = "captioned_digits_test_zeroshot_classification"
SCANS = "tfds:captioned_digits:test"


def config(data_dir, **changes) -> Config:
    tasks = f"zeroshot_classification={SCANS}; zeroshot_retrieval={SCANS}[:100]"
    changes = {"evaluation": EvaluationConfig(tasks, every=4), "duration": "6 steps", "log_every": 5} | changes
    return Config(
        model=ModelConfig(variant="ViT-W64/4@16px"),
        data=DataConfig(data_dir=str(data_dir), global_batch=32),
        optim=OptimConfig(learning_rate=1e-3, warmup="1 step", ema=0.5),
        **changes,
    )


@pytest.mark.parametrize(
    "sizes", [(2, 1, 1), *[pytest.param(s, marks=pytest.mark.full) for s in ((1, 1, 1), (4, 2, 1))]]
)
def test_a_run_finds_what_its_last_checkpoint_gives_to_eval(sizes, data_dir, tmp_path):
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    train(config(data_dir, mesh=MeshConfig(*sizes)), tmp_path, devices=devices)
    lines = {line["step"]: line for line in read_lines(tmp_path / "metrics.jsonl")}
    assert {step: f"{DIGITS}/acc1" in line for step, line in lines.items()} == {1: False, 4: True, 5: False, 6: True}
    model = OnMesh.of(pretrained.read(tmp_path), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    for task, spec in (("zeroshot_classification", SCANS), ("zeroshot_retrieval", f"{SCANS}[:100]")):
        source = open_source(spec, data_dir=str(data_dir), default_split="test", needs=("image", "label", "captions"))
        expected = TASKS[task].run(model, source).metrics
        name = f"{source.name}_{source.split}_{task}"
        assert {metric: lines[6][f"{name}/{metric}"] for metric in expected} == pytest.approx(expected, abs=1e-9)
        for step in (4, 6):
            result = json.loads((tmp_path / "eval" / str(step) / f"{name}.json").read_text())
            assert result["metrics"] == {metric: lines[step][f"{name}/{metric}"] for metric in expected}
            assert result["pretrained"] == f"{tmp_path}/checkpoints/{step}"


@pytest.mark.full
def test_the_checkpoint_where_a_metric_was_highest_stays(data_dir, tmp_path):
    acc1 = f"{DIGITS}/acc1"
    tasks = EvaluationConfig(f"zeroshot_classification={SCANS}", every=2)
    kept = {"keep_best": acc1, "keep_checkpoints": 1, "checkpoint_every": 100, "duration": "12 steps"}
    train(config(data_dir, evaluation=tasks, **kept), tmp_path, devices=jax.devices()[:1])
    found = {line["step"]: line[acc1] for line in read_lines(tmp_path / "metrics.jsonl") if acc1 in line}
    assert list(found) == [2, 4, 6, 8, 10, 12]
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    best = max(found, key=lambda step: (found[step], step))
    assert saved == sorted({best, 12})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation": EvaluationConfig("zero=tfds:captioned_digits")}, "unknown task 'zero'; there are"),
        ({"evaluation": EvaluationConfig("zeroshot_retrieval=tfds:captioned_digit")}, "captioned_digits"),
        (
            {"keep_best": f"{DIGITS}/acc1", "evaluation": EvaluationConfig()},
            f"keep_best='{DIGITS}/acc1' is a metric of evaluation.tasks, which is not set: set it to",
        ),
        ({"keep_best": "captioned_digits/acc1"}, "keep_best='captioned_digits/acc1' is no metric of evaluation.tasks"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(changes, words, data_dir, tmp_path):
    with pytest.raises(UserError) as error:
        train(config(data_dir, **changes), tmp_path / "run")
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_processes_that_evaluate_on_other_copies_of_a_data_set_do_not_agree(data_dir, tmp_path, monkeypatch):
    class Asked(Exception):
        """What the processes are to agree on."""

    def ask(facts: dict) -> None:
        raise Asked(facts)

    monkeypatch.setattr(distributed, "agree", ask)
    found = []
    for records in (4, 4, 5):
        folder = shards.write_several(tmp_path / str(len(found)) / "pairs", shards=1, records=records)
        tasks = EvaluationConfig(f"zeroshot_retrieval=wds:{folder}")
        with pytest.raises(Asked) as asked:
            train(config(data_dir, evaluation=tasks), tmp_path / "run", devices=jax.devices()[:1])
        found.append({name: fact for name, fact in asked.value.args[0].items() if name != "the config"})
    assert found[0] == found[1], "where they lie does not count"
    assert [name for name in found[0] if found[0][name] != found[2][name]] == ["the data of evaluation.tasks"]


def test_tasks_that_are_not_written_so_are_refused():
    with pytest.raises(UserError, match=r"evaluation.tasks='acc1' should be TASK=DATASET"):
        EvaluationConfig("acc1")
