"""The data sets that ship with the package: their splits are fixed and apart, and captions say what is to be seen."""

import io
import json
import re
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from clip_jax.data.embedded import EMBEDDED, digits, shapes
from clip_jax.data.sources import Source, open_source

ROOT = Path(__file__).parents[2]

# --- captioned_digits ---


@pytest.fixture(scope="module")
def scans() -> dict[str, dict[int, dict]]:
    """What the builder generates, by split and by the number of the scan."""
    return {
        split: dict(digits.CaptionedDigits._generate_examples(None, split == "test")) for split in ("train", "test")
    }


def test_every_scan_is_in_one_split_and_a_fifth_of_each_digit_is_held_out(scans):
    assert not scans["train"].keys() & scans["test"].keys()
    assert sorted(scans["train"].keys() | scans["test"].keys()) == list(range(1797))
    labels = load_digits().target
    for digit, number in Counter(labels.tolist()).items():
        assert sum(labels[i] == digit for i in scans["test"]) == number // 5


def test_images_and_labels_are_scikit_learns(scans):
    originals = load_digits()
    for i, example in (scans["train"] | scans["test"]).items():
        pixels = np.asarray(Image.open(example["image"]), float)
        np.testing.assert_array_equal(np.round(pixels * 16 / 255), originals.images[i])
        assert example["label"] == originals.target[i]


def test_captions_of_a_scan_name_its_digit_and_no_other(scans):
    for example in scans["test"].values():
        named = {word for caption in example["captions"] for word in re.findall(r"\w+", caption)}
        named &= {*digits.DIGITS, *map(str, range(10))}
        assert named == {digits.DIGITS[example["label"]], str(example["label"])}
        assert len(set(example["captions"])) == 2 * len(digits.CAPTIONS)


# --- captioned_shapes ---


def captions_of(composition: shapes.Composition) -> list[str]:
    return [caption.format(**composition._asdict()) for caption in shapes.CAPTIONS]


def test_576_of_5184_compositions_are_held_out_and_never_in_training():
    train, test = (set(shapes.compositions(held_out=held_out)) for held_out in (False, True))
    assert len(test) == 576
    assert len(train | test) == 8 * 6 * 3 * 9 * 4 == 5184
    assert not train & test


def test_the_held_out_compositions_stay_the_same_for_ever():
    words = "\n".join(" ".join(composition) for composition in shapes.compositions(held_out=True))
    assert zlib.crc32(words.encode()) == 73_305_708


def test_every_word_of_the_held_out_captions_is_learnt_and_every_pair_of_properties_too():
    def seen(held_out: bool) -> tuple[set, set]:
        words, pairs = set(), set()
        for composition in shapes.compositions(held_out=held_out):
            words |= {word for caption in captions_of(composition) for word in re.findall(r"\w+", caption)}
            pairs |= {(a, b) for a in composition for b in composition}
        return words, pairs

    (words, pairs), (test_words, test_pairs) = seen(False), seen(True)
    assert test_words <= words
    assert test_pairs <= pairs


def test_captions_tell_any_two_compositions_apart():
    everything = shapes.compositions(held_out=False) + shapes.compositions(held_out=True)
    for wording in zip(*map(captions_of, everything), strict=True):
        assert len(set(wording)) == len(everything)


def coloured(composition: shapes.Composition) -> np.ndarray:
    """Returns the [row, column] of every pixel of about the composition's colour."""
    pixels = np.asarray(shapes.draw(composition, np.random.RandomState(0)), np.float64)
    return np.argwhere(np.linalg.norm(pixels - shapes.COLOURS[composition.colour], axis=-1) < 45)


def test_what_is_drawn_has_the_captions_colour_and_place():
    for composition in shapes.compositions(held_out=True)[::3]:
        found = coloured(composition)
        words = composition.place.split()
        row = 0.2 if "top" in words else 0.8 if "bottom" in words else 0.5
        column = 0.2 if "left" in words else 0.8 if "right" in words else 0.5
        expected = shapes.SIDE * np.array([row, column]) - 0.5
        # It is moved by at most 1.3 pixels; grain and smooth edges do the rest.
        assert np.abs(found.mean(axis=0) - expected).max() < 2, composition


def test_what_is_called_larger_is_larger():
    for composition in shapes.compositions(held_out=True)[::10]:
        small, medium, large = (len(coloured(composition._replace(size=size))) for size in ("small", "medium", "large"))
        assert 1.3 * small < medium < large / 1.3, composition


def test_a_drawing_is_a_function_of_composition_and_seed():
    composition = shapes.compositions(held_out=True)[0]
    one, again, other = (np.asarray(shapes.draw(composition, np.random.RandomState(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


# --- both, made and read through TFDS ---


@pytest.fixture(scope="module")
def made(data_dir) -> str:
    """The folder with both data sets, made in a process of its own: with types checked it takes thrice the time."""
    make = "from clip_jax.data.sources import open_source\n"
    make += "\n".join(f"open_source('tfds:{name}', data_dir={str(data_dir)!r})" for name in EMBEDDED)
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True, capture_output=True)
    return str(data_dir)


@pytest.mark.parametrize(
    ("name", "split", "length", "size", "classes"),
    [
        ("captioned_digits", "train", 1442, (8, 8), digits.DIGITS),
        ("captioned_digits", "test", 355, (8, 8), digits.DIGITS),
        ("captioned_shapes", "train", 13824, (64, 64), shapes.SHAPES),
        ("captioned_shapes", "test", 576, (64, 64), shapes.SHAPES),
    ],
)
def test_a_source_has_all_records_with_images_captions_and_labels(name, split, length, size, classes, made):
    source = open_source(f"tfds:{name}:{split}", data_dir=made)
    assert isinstance(source, Source)
    assert (len(source), source.name, source.split, source.classnames) == (length, name, split, classes)
    assert json.loads(json.dumps(source.fingerprint())) == source.fingerprint()
    for i in (0, 1, length // 2, length - 1):
        record = source[i]
        assert Image.open(io.BytesIO(record.image)).size == size
        assert all(classes[record.label] in caption or str(record.label) in caption for caption in record.captions)


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_data_set_that_is_there_is_not_made_again(name, made):
    def files() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in Path(made, name).glob("*/*")}

    before = files()
    open_source(f"tfds:{name}:test", data_dir=made)
    assert before == files() != {}
