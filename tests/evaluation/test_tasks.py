"""The tasks: the same numbers on any devices, and what they find is what counting by hand finds."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import one_of_two
import pytest
import tiny
from processes import finish, free_port, start

from clip_jax.errors import UserError
from clip_jax.evaluation import zero_shot
from clip_jax.evaluation.encode import Images, encode_texts
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.retrieval import metrics as recalls
from clip_jax.evaluation.tasks import TASKS, Options


def by_hand(source) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines [images, classes] and labels, without blocks and devices."""
    model = tiny.model()
    images = np.concatenate([model.gathered(part.features)[part.rows] for part in Images(model, source)])
    names, templates = source.classnames, ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")
    texts = encode_texts(model, [template.format(name) for name in names for template in templates])
    mean = texts.reshape(len(names), len(templates), -1).mean(axis=1)
    classes = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    readable = [i for i in range(len(source)) if i not in source.damaged]
    return images @ classes.T, np.array([source.label(i) for i in readable])


@pytest.mark.parametrize("length", [7, 40])
def test_classification_finds_what_counting_by_hand_finds(length):
    source = tiny.Memory(length, damaged=(2,))
    scores, labels = by_hand(source)
    found = TASKS["zeroshot_classification"].run(tiny.model(), source)
    assert found.metrics["acc1"] == (scores.argmax(axis=1) == labels).mean()
    assert found.metrics["acc5"] == (np.argsort(-scores, axis=1)[:, :5] == labels[:, None]).any(axis=1).mean()
    odds = np.exp(scores / 0.07)
    np.testing.assert_allclose(found.found.confidence, (odds / odds.sum(axis=1, keepdims=True)).max(axis=1), rtol=1e-4)
    assert (found.evaluated, found.left_out) == (length - 1, {"damaged image": 1})
    for matches, column in zip(found.matches, scores.T, strict=True):
        best = np.argsort(-column, kind="stable")[:8]
        assert matches.images == [i + (i >= 2) for i in best.tolist()]
    assert [matches.right for matches in found.matches] == [
        [source.label(i) == c for i in matches.images] for c, matches in enumerate(found.matches)
    ]


@pytest.mark.parametrize("task", ["zeroshot_classification", "zeroshot_retrieval"])
@pytest.mark.parametrize("length", [1, 7, pytest.param(1001, marks=pytest.mark.full)])
def test_one_device_and_eight_find_the_same(task, length):
    source = tiny.Memory(length, captions=3, damaged=() if length == 1 else (3, length - 1))
    one, eight = (TASKS[task].run(tiny.model(devices), source) for devices in (1, 8))
    assert one.metrics == pytest.approx(eight.metrics, abs=0, nan_ok=True)
    assert (one.evaluated, one.left_out) == (eight.evaluated, eight.left_out)


def test_retrieval_with_several_captions_and_missing_images_counts_as_sorting_does():
    source = tiny.Memory(30, captions=4, damaged=(0, 11))
    model = tiny.model()
    found = TASKS["zeroshot_retrieval"].run(model, source, Options(recalls=(1, 2, 20)))
    kept = [i for i in range(30) if i not in source.damaged]
    texts = [text for i in kept for text in source[i].captions]
    of = np.repeat(np.arange(len(kept)), [len(source[i].captions) for i in kept])
    images = np.concatenate([model.gathered(part.features)[part.rows] for part in Images(model, source)])
    scores = encode_texts(model, texts) @ images.T
    for k in (1, 2, 20):
        nearest_images, nearest_texts = np.argsort(-scores, axis=1)[:, :k], np.argsort(-scores.T, axis=1)[:, :k]
        assert found.metrics[f"image_retrieval_recall@{k}"] == (nearest_images == of[:, None]).any(axis=1).mean()
        right = of[nearest_texts] == np.arange(len(kept))[:, None]
        assert found.metrics[f"text_retrieval_recall@{k}"] == right.any(axis=1).mean()
    assert list(found.metrics) == list(recalls(found.found.ranks, (1, 2, 20)))
    assert found.found.texts == texts
    assert found.found.index.tolist() == kept


def test_a_probe_on_one_device_and_on_eight_learns_the_same():
    train, test = tiny.Memory(60, split="train"), tiny.Memory(37, damaged=(4,))
    options = Options(train=train, feature="embedding")
    one, eight = (TASKS["linear_probe"].run(tiny.model(devices), test, options) for devices in (1, 8))
    assert one.metrics == eight.metrics
    assert one.metrics["lp_acc1"] > 0.5, "colours go by class"
    assert list(one.metrics) == [
        *("lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "weight_decay", "epochs", "seed", "fewshot_k", "normalized")
    ]
    assert one.metrics["normalized"] is True
    assert one.evaluated == 36


def test_a_probe_learns_from_the_classes_that_it_is_tested_on():
    train = tiny.Memory(40, split="train", classnames=("ant", *tiny.CLASSNAMES))
    with pytest.raises(UserError, match="class 0 is 'ant' in memory:train and 'cat' in memory:test"):
        TASKS["linear_probe"].run(tiny.model(), tiny.Memory(9), Options(train=train))
    unnamed = tiny.Memory(40, split="train", classnames=())
    found = TASKS["linear_probe"].run(tiny.model(), tiny.Memory(9, classnames=()), Options(train=unnamed))
    assert found.classnames == ("0", "1", "2", "3", "4", "5"), "as many as there are labels"


def test_what_a_probe_could_not_learn_from_is_in_its_result_too():
    train = tiny.Memory(40, split="train", damaged=(1, 2))
    found = TASKS["linear_probe"].run(tiny.model(), tiny.Memory(9, damaged=(3,)), Options(train=train))
    assert found.left_out == {"damaged image": 1, "damaged image (of train)": 2}


@pytest.mark.parametrize("path", ["text/token_embedding", "text/blocks/mlp/up/kernel", "logit_scale"])
def test_another_model_has_another_classifier_whatever_differs(path, tmp_path):
    model, options = tiny.model(), Options(cache=tmp_path)
    TASKS["zeroshot_classification"].run(model, tiny.Memory(3), options)
    bundle = tiny.bundle()
    changed = dataclasses.replace(bundle, arrays=bundle.arrays | {path: bundle.arrays[path] * np.float32(1.5)})
    other = OnMesh.of(changed, model.mesh, batch_size=4)
    assert other.fingerprint != model.fingerprint
    TASKS["zeroshot_classification"].run(other, tiny.Memory(3), options)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_reason_not_to_evaluate(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    found = TASKS["zeroshot_classification"].run(tiny.model(), tiny.Memory(3), Options(cache=tmp_path / "file"))
    assert found.evaluated == 3
    assert "the classifier is not kept: cannot write" in capsys.readouterr().err


def test_a_classifier_is_made_once_for_a_model_and_its_prompts(tmp_path, monkeypatch):
    model, options = tiny.model(), Options(cache=tmp_path / "new")
    first = TASKS["zeroshot_classification"].run(model, tiny.Memory(9), options)
    [file] = (tmp_path / "new").iterdir()
    made = zero_shot.classifier
    monkeypatch.setattr(zero_shot, "classifier", lambda *_, **__: pytest.fail("it is there"))
    again = TASKS["zeroshot_classification"].run(model, tiny.Memory(9), options)
    assert again.metrics == first.metrics
    monkeypatch.setattr(zero_shot, "classifier", made)
    TASKS["zeroshot_classification"].run(model, tiny.Memory(9, templates=("{c}",)), options)
    TASKS["zeroshot_classification"].run(tiny.model(dtype="bfloat16"), tiny.Memory(9), options)
    assert len(list((tmp_path / "new").iterdir())) == 3, "other prompts, another dtype"
    file.write_bytes(file.read_bytes()[:100])
    assert TASKS["zeroshot_classification"].run(model, tiny.Memory(9), options).metrics == first.metrics


@dataclasses.dataclass(frozen=True)
class Odd(tiny.Memory):
    """A data set whose labels are not those of its classes."""

    odd: int | None = None

    def __getitem__(self, index):
        return super().__getitem__(index)._replace(label=self.odd if index == 5 else 0)


@pytest.mark.parametrize("odd", [None, -1, 6])
def test_labels_that_are_no_class_are_refused(odd):
    words = "has no label" if odd is None else f"has the label {odd}, and there are 6 class names, 0 to 5"
    for task in ("zeroshot_classification", "linear_probe"):
        with pytest.raises(UserError, match=f"record 5 of memory:test {words}"):
            TASKS[task].run(tiny.model(), Odd(8, odd=odd), Options(train=tiny.Memory(8)))


def test_a_model_that_has_diverged_is_refused_instead_of_being_perfect():
    model = tiny.model()
    model.weights, model.pretrained = jax.tree.map(lambda x: x * np.nan, model.weights), "runs/diverged"
    for task in TASKS:
        with pytest.raises(UserError, match="runs/diverged gives embeddings that are not finite"):
            TASKS[task].run(model, tiny.Memory(9), Options(train=tiny.Memory(9)))


@pytest.mark.full
@pytest.mark.parametrize("length", [1, 7, 23, 1001])
def test_two_processes_find_what_one_does(length):
    script, port = Path(__file__).with_name("one_of_two.py"), free_port()
    both = [start([str(script), str(port), str(i), str(length)], JAX_NUM_CPU_DEVICES="2") for i in range(2)]
    told = finish(both)
    assert [code for code, *_ in told] == [0, 0], told
    first, second = (json.loads(output.splitlines()[-1]) for _, output, _ in told)
    assert first == second
    alone = json.loads(json.dumps(one_of_two.found(tiny.model(), length)))
    # A process of two devices shares its threads out otherwise than one of eight, and a product's last bit may be
    # another: enough for L-BFGS to end some iterations sooner, at the same optimum.
    for found in (first, alone):
        found["linear_probe"][0] = re.sub(r"'epochs': \d+, ", "", found["linear_probe"][0])
    assert first == alone
