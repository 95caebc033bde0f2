"""The page: its numbers against counting by hand, and a file that needs no other and believes nobody's text."""

import base64
import collections
import html.parser
import io
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from noise import Noise
from PIL import Image

from clip_jax.evaluation import breakdown, page, run, zero_shot
from clip_jax.evaluation.retrieval import Ranks, metrics
from clip_jax.evaluation.run import Done, Evaluation
from clip_jax.evaluation.tasks import Matches, Options, Result, Retrieved
from clip_jax.evaluation.zero_shot import Predictions

EVIL = "<script>alert('x')</script> & \"nine\""


def predictions(seed: int, n: int, classes: int, accuracy: float = 0.6) -> Predictions:
    """Returns what a made-up model says; some classes have no image, and it is never wrong about some."""
    random = np.random.default_rng(seed)
    labels = np.random.default_rng(0).integers(0, max(classes - 1, 1), n).astype(np.int32)
    best = np.stack([random.permutation(classes)[:5] for _ in range(n)]).astype(np.int32)
    best[:, 0] = np.where((random.random(n) < accuracy) | (labels == 1), labels, best[:, 0])
    return Predictions(best, labels, random.random(n).astype(np.float32), np.arange(n), classes)


def classified(model: str, source: Noise, found: Predictions, task: str = "zeroshot_classification") -> Done:
    return made(model, source, task, Result(zero_shot.metrics(found), len(source), {}, found, source.classnames))


def made(model: str, source: Noise, task: str, result: Result) -> Done:
    written = {"dataset": source.name, "model": "ViT", "pretrained": model, "task": task, "metrics": result.metrics}
    if result.left_out:
        written |= {"evaluated": result.evaluated, "left_out": result.left_out}
    return Done(Evaluation(task, source, Options()), written, ["result.json"], result)


def retrieved(model: str, source: Noise, seed: int) -> Done:
    random, texts = np.random.default_rng(seed), 2 * len(source)
    ranks = Ranks(random.integers(0, len(source), texts), random.integers(0, texts, len(source)))
    words = [f"text {t} {EVIL} {'long ' * 100}" for t in range(texts)]
    matches = tuple(Matches(words[t], [3, 1, 2], [False, True, False]) for t in (0, 5))
    found = Retrieved(ranks, words, np.repeat(np.arange(len(source)), 2), np.arange(len(source)))
    return made(model, source, "zeroshot_retrieval", Result(metrics(ranks), len(source), {}, found, matches=matches))


class Reader(html.parser.HTMLParser):
    """What a browser would find, and whether every element ends where it should."""

    EMPTY = ("meta", "img", "br", "wbr")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], collections.Counter(), [], []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes
        self.open += [] if tag in self.EMPTY else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(file: Path) -> Reader:
    reader = Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def images(reader: Reader) -> list[Image.Image]:
    found = [value.split(",")[1] for name, value in reader.attributes if name == "src"]
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def words(reader: Reader) -> str:
    return " ".join(" ".join(reader.words).split())


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Reader:
    """The page of two models, the second of which had one evaluation done before."""
    digits = Noise(60, classnames=("zero", EVIL, "two", "three", "four", "five", "none"), bad=(7, 8, 9))
    photos = Noise(30, classnames=tuple("abcdef"), size=(300, 200))
    done = []
    for seed, model in enumerate(("first <b>", "second")):
        done.append(classified(model, digits, predictions(seed, 60, 7)))
        done.append(retrieved(model, photos, seed))
        probed = classified(model, photos, predictions(seed, 30, 6), "linear_probe")
        left_out = {"damaged image": 2 + seed}
        done.append(probed._replace(written=probed.written | {"evaluated": 28 - seed, "left_out": left_out}))
    done[-1] = done[-1]._replace(result=None)
    return read(page.write(tmp_path_factory.mktemp("page"), done))


def test_the_page_needs_nothing_else_and_runs_nothing(two):
    assert not set(two.tags) & {"script", "link", "iframe", "object", "b<", "form"}
    values = {name: [value for key, value in two.attributes if key == name] for name in ("src", "href")}
    assert all(value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for value in values["src"])
    assert all(re.fullmatch(r"#e\d", value) for value in values["href"])
    assert not [name for name, _ in two.attributes if name.startswith("on")]
    assert not [words for words in two.words if "url(" in words or "@import" in words]


def test_texts_are_shown_as_they_are_and_long_ones_cut(two):
    assert EVIL in words(two)
    assert "first <b>" in words(two)
    assert "long " * 100 not in words(two)
    assert "…" in words(two)


def test_images_are_small(two):
    small = [image for image in images(two) if image.format == "JPEG"]
    assert {image.size for image in small} == {(160, 107)}
    assert {image.size for image in images(two) if max(image.size) < 100} == {(20, 20)}, "small ones as they are"


def test_what_is_left_out_done_before_or_lost_since_is_said(two):
    said = words(two)
    assert "28 images; left out: damaged image 2" in said
    assert "27 images; left out: damaged image 3; done before (--resume): only its metrics are known" in said
    assert "1 of 7 classes have no image" in said
    assert "cannot be read: no image" in said


def test_retrieval_frames_the_right_images_and_shows_the_latest_texts(two):
    frames = collections.Counter(value for name, value in two.attributes if name == "class" and value)
    assert (frames["right"], frames["wrong"]) == (2 * 2 * 1, 2 * 2 * 2)
    assert "place 30 of 30" in words(two)
    assert "Half of the 60 texts have their image at place" in words(two)


def test_differences_say_which_way(two):
    cells = re.findall(r"[+−]\d+\.\d|±0\.0", words(two))
    first, second = (zero_shot.metrics(predictions(seed, 60, 7))["acc1"] for seed in (0, 1))
    assert cells[0] == f"{100 * (second - first):+.1f}".replace("-", "−")
    assert {value for name, value in two.attributes if name == "class" and "n d " in (value or "")} >= {
        "n d up",
        "n d down",
    }


@pytest.mark.parametrize(("classes", "rows", "pictures"), [(50, 49, 1), (300, 30, 1), (2001, 30, 0)])
def test_of_many_classes_some_are_shown(tmp_path, classes, rows, pictures):
    source = Noise(5 * classes, classnames=tuple(f"class {c}" for c in range(classes)))
    found = predictions(0, 5 * classes, classes)
    found = found._replace(labels=np.repeat(np.arange(classes, dtype=np.int32), 5))
    if classes == 50:
        found = found._replace(labels=np.minimum(found.labels, 48))
    reader = read(page.write(tmp_path, [classified("one", source, found)]))
    assert sum(1 for name, value in reader.attributes if name == "style") == rows
    assert sum(1 for image in images(reader) if image.width > 700) == pictures
    assert (tmp_path / "index.html").stat().st_size < 800_000


def test_two_models_show_the_classes_that_differ_most():
    of_each = [breakdown.per_class(predictions(seed, 900, 90)) for seed in (0, 1)]
    groups = dict(page._chosen(of_each))
    assert list(groups) == ["the 20 worst", "the 10 best", "the 20 that differ most"]
    shares = np.stack([one.share for one in of_each])
    mean, apart = shares.mean(axis=0), np.abs(shares[0] - shares[1])
    known = np.isfinite(mean)
    assert known.sum() == 89
    np.testing.assert_array_equal(mean[groups["the 20 worst"]], np.sort(mean[known])[:20])
    np.testing.assert_array_equal(mean[groups["the 10 best"]], np.sort(mean[known])[::-1][:10])
    np.testing.assert_array_equal(apart[groups["the 20 that differ most"]], np.sort(apart[known])[::-1][:20])


def test_calibration_equals_going_through_all_bins():
    random = np.random.default_rng(0)
    confidence = np.concatenate([random.random(500) ** 0.5, [0, 1, 0.2, 0.2, 1 + 1e-7]]).astype(np.float32)
    right, exact = random.random(len(confidence)) < confidence, confidence.astype(np.float64)
    for bins in (1, 5, 15, 400):
        found, error = breakdown.calibration(confidence, right, bins), 0.0
        for i in range(bins):
            low, high = i / bins if i else -np.inf, (i + 1) / bins if i < bins - 1 else np.inf
            here = (low < exact) & (exact <= high)
            assert found.images[i] == here.sum()
            if not here.any():
                assert np.isnan([found.confidence[i], found.right[i]]).all()
                continue
            sure, share = exact[here].mean(), right[here].mean()
            np.testing.assert_allclose([found.confidence[i], found.right[i]], [sure, share], rtol=1e-12)
            error += here.sum() / len(confidence) * abs(sure - share)
        assert found.error == pytest.approx(error, rel=1e-12)
        assert found.images.sum() == len(confidence)


@pytest.mark.parametrize("n", [1, 7, 400])
def test_what_becomes_of_a_class_equals_counting_its_images(n):
    given = predictions(2, n, 12, accuracy=0.3)
    found = breakdown.per_class(given)
    for c in range(12):
        taken = given.best[given.labels == c, 0]
        wrong = collections.Counter(sorted(taken[taken != c].tolist()))
        most = wrong.most_common(1)[0] if wrong else (-1, 0)  # of equals the one that was first: the smallest
        assert (found.images[c], found.right[c]) == (len(taken), (taken == c).sum())
        assert (found.taken_for[c], found.times[c]) == most
        np.testing.assert_equal(found.share[c], (taken == c).mean() if len(taken) else np.nan)


def test_the_surest_mistakes_and_the_worst_texts_come_in_order():
    found = predictions(3, 200, 6)
    wrong = [i for i in range(200) if found.best[i, 0] != found.labels[i]]
    expected = sorted(wrong, key=lambda i: -found.confidence[i])
    assert breakdown.mistakes(found, 12).tolist() == expected[:12]
    assert breakdown.mistakes(found, 1000).tolist() == expected
    ranks = Ranks(np.array([0, 3, 9, 0, 3]), np.array([0, 0]))
    given = Retrieved(ranks, list("abcde"), np.array([0, 0, 1, 1, 1]), np.array([4, 5]))
    assert page.worst(given, 12).tolist() == [2, 1, 4]
    assert page.worst(given, 1).tolist() == [2]


def test_a_model_without_a_mistake_has_a_page(tmp_path):
    found = predictions(0, 20, 6)
    best = found.best.copy()
    best[:, 0] = found.labels
    source = Noise(20, classnames=tuple("abcdef"))
    done = retrieved("perfect", Noise(8), 0)
    ranks = Ranks(np.zeros(16, int), np.zeros(8, int))
    done = done._replace(result=done.result._replace(found=done.result.found._replace(ranks=ranks)))
    reader = read(page.write(tmp_path, [classified("perfect", source, found._replace(best=best)), done]))
    assert words(reader).count("There is none.") == 2


@pytest.mark.full
def test_what_a_model_was_found_to_do_has_a_page(tmp_path):
    evaluations = [
        Evaluation("zeroshot_classification", Noise(bad=(3,)), Options()),
        Evaluation("zeroshot_retrieval", Noise(bad=(3,)), Options(recalls=(2, 7))),
    ]
    done = []
    for seed in (0, 1):
        files = {one.name: tmp_path / str(seed) / f"{one.name}.json" for one in evaluations}
        done += run.evaluate_all(tiny.model(seed=seed), evaluations, lambda one, files=files: files[one.name])[0]
    said = words(read(page.write(tmp_path / "report", done)))
    assert "18 images; left out: no image 1" in said
    for name in ("random", "random 1", tiny.VARIANT, "Recall: found among the nearest", "text 1 of record 18"):
        assert name in said
