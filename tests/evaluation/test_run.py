"""Evaluations and their files: in CLIP_benchmark's schema, whole or not there, resumed; and suites."""

import json
from pathlib import Path

import pytest
import tiny
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.evaluation import run, suite, zero_shot
from clip_jax.evaluation.run import Evaluation
from clip_jax.evaluation.suite import Suite, Wanted
from clip_jax.evaluation.tasks import TASKS, Options

SCHEMA = ["dataset", "model", "pretrained", "task", "metrics", "language"]
CLASSIFICATION, RETRIEVAL, PROBE = "zeroshot_classification", "zeroshot_retrieval", "linear_probe"


def evaluation(task: str = CLASSIFICATION, *, length: int = 9, damaged: tuple[int, ...] = (), **options) -> Evaluation:
    options.setdefault("train", tiny.Memory(40, split="train"))
    return Evaluation(task, tiny.Memory(length, damaged=damaged), Options(**options))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("task", "metrics", "pictures"),
    [
        (CLASSIFICATION, ["acc1", "acc5", "mean_per_class_recall"], ["confusion", "matches"]),
        (RETRIEVAL, [f"{way}_retrieval_recall@{k}" for k in (1, 5, 10) for way in ("image", "text")], ["matches"]),
        (
            PROBE,
            [
                *("lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "weight_decay", "epochs", "seed", "fewshot_k"),
                "normalized",
            ],
            ["confusion"],
        ),
    ],
)
def test_a_result_is_in_its_schema_with_pictures_beside_it(task, metrics, pictures, tmp_path, capsys):
    done = run.evaluate(tiny.model(), evaluation(task), tmp_path / "new" / "result.json")
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert written == done.written
    assert list(written) == SCHEMA
    assert list(written["metrics"]) == metrics
    drawn = [f"result_{picture}.png" for picture in pictures]
    assert files(tmp_path / "new") == [".result.asked", "result.json", *drawn]
    assert done.files == [str(tmp_path / "new" / name) for name in ("result.json", *drawn)]
    for picture in pictures:
        with Image.open(tmp_path / "new" / f"result_{picture}.png") as image:
            assert min(image.size) > 300
    run.show([done])
    said = capsys.readouterr().out
    assert all(name in said for name in metrics)
    assert str(tmp_path / "new" / f"result_{pictures[0]}.png") in said


def test_what_was_left_out_is_in_the_result_and_how_many_were_evaluated(tmp_path):
    done = run.evaluate(tiny.model(), evaluation(damaged=(1, 4)), tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    assert list(written) == [*SCHEMA, "evaluated", "left_out"]
    assert (written["evaluated"], written["left_out"]) == (7, {"damaged image": 2})
    assert done.result.evaluated == 7


def test_class_names_and_templates_are_dumped_when_asked_for(tmp_path):
    asked = evaluation(dump_classnames=True, dump_templates=True)
    written = run.evaluate(tiny.model(), asked, tmp_path / "result.json").written
    assert written["classnames"] == list(tiny.CLASSNAMES)
    assert written["templates"][0] == "a photo of a {}."


class Killed(BaseException):
    """What ends a run in its middle."""


def test_a_run_that_was_cut_goes_on_with_what_is_not_done(tmp_path, monkeypatch, capsys):
    def file_of(one: Evaluation) -> Path:
        return tmp_path / f"{one.name}.json"

    first, second = evaluation(), evaluation(RETRIEVAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_jax.evaluation.pictures.of", lambda *_: {"matches": cut} if _[1] == RETRIEVAL else {})

        def cut(_) -> None:
            raise Killed

        with pytest.raises(Killed):
            run.evaluate_all(tiny.model(), [first, second], file_of)
    assert files(tmp_path) == [f".{first.name}.asked", f"{first.name}.json"]
    before = (tmp_path / f"{first.name}.json").read_bytes()
    monkeypatch.setattr(zero_shot, "classify", lambda *_: pytest.fail("it is done"))
    done, problems = run.evaluate_all(tiny.model(), [first, second], file_of, resume=True)
    assert not problems
    assert [one.result is None for one in done] == [True, False]
    assert (tmp_path / f"{first.name}.json").read_bytes() == before
    assert f"{first.name}.json is done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("again", "words"),
    [
        (lambda: (tiny.model(seed=1), evaluation()), "pretrained was 'random' and is 'random 1'"),
        (lambda: (tiny.model(dtype="bfloat16"), evaluation()), "weights was "),
        (lambda: (tiny.model(), evaluation(length=10)), "data was "),
        (lambda: (tiny.model(), evaluation(templates="clip_benchmark:pets")), "prompts was "),
        (lambda: (tiny.model(), evaluation(RETRIEVAL, recalls=(1, 2))), "recall_k was [1, 5, 10] and is [1, 2]"),
        (lambda: (tiny.model(), evaluation(PROBE, seed=5)), "seed was 0 and is 5"),
        (lambda: (tiny.model(), evaluation(PROBE, train=tiny.Memory(30, split="train"))), "train was "),
    ],
)
def test_what_was_asked_otherwise_is_not_taken_for_done(again, words, tmp_path):
    pytest.importorskip("clip_benchmark")
    model, asked = again()
    file = tmp_path / "result.json"
    run.evaluate(tiny.model(), evaluation(asked.task), file, draws=False)
    done, [problem] = run.evaluate_all(model, [asked], lambda _: file, resume=True)
    assert not done
    assert f"{file} is of another evaluation: " in problem
    assert words in problem


@pytest.mark.parametrize("content", ["[]", "{}", '{"metrics": 3}'])
def test_a_file_that_is_no_result_is_not_taken_for_one(content, tmp_path):
    (tmp_path / "result.json").write_text(content)
    _, [problem] = run.evaluate_all(tiny.model(), [evaluation()], lambda _: tmp_path / "result.json", resume=True)
    assert "is no result of an evaluation: choose another --output, or delete it" in problem
    (tmp_path / "result.json").write_text("{")
    _, [problem] = run.evaluate_all(tiny.model(), [evaluation()], lambda _: tmp_path / "result.json", resume=True)
    assert "result.json cannot be read" in problem


def test_shots_have_a_result_each():
    assert evaluation(PROBE, fewshot_k=4).name == "memory_test_linear_probe_4shot"
    assert evaluation(PROBE).name == "memory_test_linear_probe"


def test_an_image_that_is_gone_when_pictures_are_drawn_does_not_cost_the_result(tmp_path, monkeypatch):
    def gone(self, index: int):
        raise FileNotFoundError

    result = TASKS[CLASSIFICATION].run(tiny.model(), evaluation().source)
    monkeypatch.setattr(run, "task_of", lambda _: TASKS[CLASSIFICATION]._replace(run=lambda *_, **__: result))
    monkeypatch.setattr(tiny.Memory, "__getitem__", gone)
    done = run.evaluate(tiny.model(), evaluation(), tmp_path / "result.json")
    assert len(done.files) == 3


def test_what_goes_wrong_with_one_data_set_is_said_when_the_others_are_done(tmp_path, capsys):
    wrong = Evaluation(RETRIEVAL, tiny.Memory(2, damaged=(0, 1), name="wrong"), Options())
    done, problems = run.evaluate_all(tiny.model(), [wrong, evaluation()], lambda one: tmp_path / f"{one.name}.json")
    assert problems == ["wrong_test_zeroshot_retrieval: no image of wrong:test can be read: damaged image 2"]
    assert len(done) == 1
    assert (tmp_path / "memory_test_zeroshot_classification.json").exists()
    assert "error: wrong_test_zeroshot_retrieval: no image of wrong:test can be read" in capsys.readouterr().err


# --- suites ---


def suite_file(path: Path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_a_suite_averages_the_main_metrics(tmp_path):
    evaluations = [evaluation(), evaluation(RETRIEVAL), evaluation(PROBE)._replace(main=("lp_acc5",))]
    done, _ = run.evaluate_all(tiny.model(), evaluations, lambda one: tmp_path / f"{one.name}.json")
    metrics = [one.written["metrics"] for one in done]
    recalls = (metrics[1]["image_retrieval_recall@1"] + metrics[1]["text_retrieval_recall@1"]) / 2
    expected = (metrics[0]["acc1"] + recalls + metrics[2]["lp_acc5"]) / 3
    found = suite.write_average(tmp_path, Suite("all", []), done)
    assert found == pytest.approx(expected)
    written = json.loads((tmp_path / "suites" / "all.json").read_text())
    assert (written["suite"], written["average"], list(written["scores"])) == (
        "all",
        found,
        [one.name for one in evaluations],
    )


def test_a_suite_is_read_and_its_data_sets_opened(tmp_path, data_dir):
    evaluations = [
        {"dataset": "tfds:captioned_digits", "task": "linear_probe", "fewshot_k": 3, "main": ["lp_acc5"]},
        {"dataset": "tfds:captioned_digits:test[:50]"},
        {"dataset": "folder:{root}/none"},
    ]
    read = suite.read(suite_file(tmp_path / "s.json", {"name": "mine", "evaluations": evaluations}))
    assert read.name == "mine"
    with pytest.raises(UserError, match="say what that is with --root=FOLDER"):
        suite.open_all(read.wanted, Options(), data_dir=str(data_dir))
    opened = suite.open_all(read.wanted[:2], Options(seed=7), data_dir=str(data_dir))
    assert [(one.task, one.source.split, len(one.source)) for one in opened] == [
        (PROBE, "test", 355),
        (CLASSIFICATION, "test", 50),
    ]
    probe = opened[0]
    assert (probe.options.train.split, probe.options.fewshot_k, probe.options.seed, probe.main) == (
        "train",
        3,
        7,
        ("lp_acc5",),
    )


def test_what_counts_in_an_average_must_be_asked_for():
    suite.check_averaged([evaluation(), evaluation(RETRIEVAL), evaluation(PROBE)])
    with pytest.raises(
        UserError, match="would have no image_retrieval_recall@1 to average: ask for it with --recall_k"
    ):
        suite.check_averaged([evaluation(), evaluation(RETRIEVAL, recalls=(5,))])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], 'should be {"name": …, "evaluations": ['),
        ({"evaluations": []}, "evaluations is empty"),
        ({"evaluations": [{"data": "x"}]}, 'evaluation 0: should be {"dataset": SPEC, "task": …}'),
        ({"evaluations": [{"dataset": "x", "taks": "y"}]}, "no such field: 'taks'; did you mean 'task'?"),
        ({"evaluations": [{"dataset": "x", "main": "acc1"}]}, "main='acc1' should be list"),
        ({"evaluations": [{"dataset": "x", "main": [1]}]}, "main=[1] should be names of metrics"),
        ({"evaluations": [{"dataset": "x"}], "mean": 1}, "no such field: 'mean'"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(content, words, tmp_path):
    with pytest.raises(UserError) as error:
        suite.read(suite_file(tmp_path / "s.json", content))
    assert words in str(error.value)


def test_what_cannot_be_evaluated_is_refused_before_anything_is(data_dir):
    digits = "tfds:captioned_digits:test"
    for wanted, words in [
        (Wanted(digits, "zero_shot_retrieval"), "did you mean 'zeroshot_retrieval'"),
        (Wanted(digits, CLASSIFICATION, ("acc2",)), "'acc2' is no metric of zeroshot_classification; did you mean"),
        (Wanted(digits, PROBE), "would learn from what it is tested on, captioned_digits:test"),
        (Wanted("folder:nowhere"), "there is no folder 'nowhere'"),
    ]:
        with pytest.raises(UserError) as error:
            suite.open_all([Wanted(digits), wanted], Options(), data_dir=str(data_dir))
        assert words in str(error.value)
