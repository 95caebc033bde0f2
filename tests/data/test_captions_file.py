"""`captions:FILE` — Karpathy's, COCO's and Flickr's captions: which images, which splits, and where the images lie."""

import json
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tar_shards import picture

from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources import Record, Source, open_source
from clip_jax.errors import UserError


def put(root: Path, contents: dict[str, Any]) -> Path:
    """Writes files: bytes, text, or anything else as JSON."""
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def opened(spec: object, split: str = "test", needs: tuple[str, ...] = ("image", "captions")) -> Source:
    return open_source(f"captions:{spec}", default_split=split, needs=needs)


def all_of(source: Source) -> list[Record]:
    return [source[i] for i in range(len(source))]


def captions_of(source: Source) -> dict[str, tuple[str, ...]]:
    return {record.id: record.captions for record in all_of(source)}


def entry(name: str, split: str, *texts: str, folder: str | None = "val2014") -> dict[str, Any]:
    """Returns an image of Karpathy's, with what else he writes of it."""
    sentences = [{"tokens": text.split(), "raw": text, "imgid": 7, "sentid": i} for i, text in enumerate(texts)]
    where = {} if folder is None else {"filepath": folder, "cocoid": 391895}
    return where | {"sentids": [0], "filename": name, "imgid": 7, "split": split, "sentences": sentences}


KARPATHY = {
    "images": [
        entry("b.jpg", "test", "a cat", "one, two", "A cat ."),
        entry("r.jpg", "restval", "rest", folder="train2014"),
        entry("a.jpg", "test", " a dog – asleep\n"),
        entry("v.jpg", "val", "val"),
        entry("t.jpg", "train", "train", folder="train2014"),
    ],
    "dataset": "coco",
}
COCO = {
    "info": {"description": "COCO 2017 Dataset"},
    "images": [{"id": 9, "file_name": "b.jpg", "coco_url": "http://x/b.jpg"}, {"id": 4, "file_name": "a.jpg"}],
    "annotations": [
        {"image_id": 4, "id": 1, "caption": "a dog"},
        {"image_id": 9, "id": 2, "caption": "a cat"},
        {"image_id": 4, "id": 3, "caption": "asleep"},
    ],
}
LINES = 'image,caption\nb.jpg,"a cat", two dogs, all\nc, d.jpg,one\nb.jpg,again\n\n'
PICTURES = {name: picture(5 + i, 9, "JPEG") for i, name in enumerate(["a.jpg", "b.jpg", "r.jpg", "t.jpg", "v.jpg"])}


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of the three formats and their images."""
    folders = {name: "train2014" if name in ("r.jpg", "t.jpg") else "val2014" for name in PICTURES}
    put(tmp_path, {f"{folders[name]}/{name}": data for name, data in PICTURES.items()})
    put(tmp_path, {"a.jpg": PICTURES["a.jpg"], "b.jpg": PICTURES["b.jpg"], "c, d.jpg": picture()})
    return put(tmp_path, {"dataset_coco.json": KARPATHY, "captions_val2017.json": COCO, "flickr_test.txt": LINES})


# --- formats ---


def test_karpathys_images_have_all_their_captions_in_his_order(root):
    source = opened(f"{root}/dataset_coco.json")
    assert isinstance(source, Source)
    assert (source.name, source.split, source.classnames, source.templates) == ("coco", "test", (), ())
    assert list(captions_of(source).items()) == [
        ("val2014/b.jpg", ("a cat", "one, two", "A cat .")),
        ("val2014/a.jpg", (" a dog – asleep\n",)),
    ]
    assert [record.image for record in all_of(source)] == [PICTURES["b.jpg"], PICTURES["a.jpg"]]
    assert {record.label for record in all_of(source)} == {None}
    assert source.shard_of(1) == "dataset_coco.json, images 0 …"


def test_karpathys_splits_are_chosen_by_name_and_restval_is_trained_on(root):
    file = f"{root}/dataset_coco.json"
    assert list(captions_of(opened(f"{file}:val"))) == ["val2014/v.jpg"]
    assert list(captions_of(opened(f"{file}:train"))) == ["train2014/r.jpg", "train2014/t.jpg"]
    assert captions_of(opened(file, split="train")) == captions_of(opened(f"{file}:train"))
    assert len(opened(f"{file}:train[1:]")) == 1


def test_flickrs_images_have_no_folder_of_their_own(root):
    content = {"images": [entry("a.jpg", "test", "a dog", folder=None)], "dataset": "flickr30k"}
    put(root, {"dataset_flickr30k.json": content, "unnamed.v2.json": {"images": content["images"]}})
    source = opened(f"{root}/dataset_flickr30k.json")
    assert (source.name, captions_of(source)) == ("flickr30k", {"a.jpg": ("a dog",)})
    assert opened(f"{root}/unnamed.v2.json").name == "unnamed.v2"


def test_cocos_own_annotations_are_put_together_by_image(root):
    source = opened(f"{root}/captions_val2017.json")
    assert (source.name, source.split) == ("captions_val2017", "all")
    assert list(captions_of(source).items()) == [("b.jpg", ("a cat",)), ("a.jpg", ("a dog", "asleep"))]


def test_lines_are_a_name_and_a_caption_which_may_have_commas_and_quotes(root):
    source = opened(f"{root}/flickr_test.txt")
    assert (source.name, source.split) == ("flickr_test", "all")
    assert captions_of(source) == {"b.jpg": ('"a cat", two dogs, all', "again"), "c, d.jpg": ("one",)}
    put(root, {"windows.txt": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()})
    assert captions_of(opened(f"{root}/windows.txt")) == captions_of(source)


# --- what is left out ---


def test_images_without_a_caption_are_left_out_and_counted(root):
    images = [*KARPATHY["images"], entry("v.jpg", "test"), entry("v.jpg", "test", " ", ""), entry("v.jpg", "val")]
    put(root, {"some.json": {"images": images}})
    source = opened(f"{root}/some.json")
    assert len(source) == 2
    assert source.inventory().left_out == {"no caption": 2}
    assert source.inventory().shards == 1


def test_captions_of_images_that_are_not_listed_are_counted(root):
    put(root, {"fewer.json": COCO | {"images": COCO["images"][1:]}})
    source = opened(f"{root}/fewer.json")
    assert captions_of(source) == {"a.jpg": ("a dog", "asleep")}
    assert source.inventory().left_out == {"caption of an image that is not listed": 1}


def test_an_image_that_is_not_there_is_a_bad_record_and_no_other(root):
    images = [*KARPATHY["images"], entry("gone.jpg", "test", "gone"), entry("\0.jpg", "test", "no name")]
    put(root, {"some.json": {"images": images}})
    source = opened(f"{root}/some.json")
    assert len(source) == 4
    for i in (2, 3):
        with pytest.raises(BadRecord) as error:
            source[i]
        assert error.value.problem is Problem.NO_IMAGE


# --- where it lies ---


def test_images_may_lie_in_a_folder_that_is_named(root, tmp_path):
    put(tmp_path / "annotations", {"k.json": KARPATHY, "c.json": COCO})
    folder = tmp_path / "annotations"
    assert list(captions_of(opened(f"{folder}/k.json:val@{root}/"))) == ["val2014/v.jpg"]
    assert list(captions_of(opened(f"{folder}/k.json@{root}"))) == ["val2014/b.jpg", "val2014/a.jpg"]
    assert all_of(opened(f"{folder}/c.json@{root}/val2014")) == all_of(opened(f"{root}/captions_val2017.json"))


def test_paths_may_be_relative_short_and_with_the_signs_of_a_spec(root, monkeypatch):
    put(root / "a:b@c.json:v", {"k.json": KARPATHY, "val2014/b.jpg": PICTURES["b.jpg"]})
    monkeypatch.chdir(root / "a:b@c.json:v")
    expected = captions_of(opened(f"{root}/dataset_coco.json:val"))
    assert captions_of(opened("../dataset_coco.json:val")) == expected
    assert captions_of(opened("k.json:val@..")) == expected
    assert captions_of(opened(f"{root}/a:b@c.json:v/k.json:val@{root}")) == expected
    monkeypatch.setenv("HOME", str(root))
    assert captions_of(opened("~/dataset_coco.json:val")) == captions_of(opened("k.json:val@~")) == expected


def test_file_and_images_may_be_behind_urls(root, tmp_path):
    system, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    for name in ("dataset_coco.json", "val2014/a.jpg", "val2014/b.jpg"):
        system.pipe_file(f"{url}/{name}", (root / name).read_bytes())
    expected = all_of(opened(f"{root}/dataset_coco.json"))
    assert all_of(opened(f"{url}/dataset_coco.json")) == expected
    assert all_of(opened(f"{url}/dataset_coco.json:test@{root}")) == expected
    assert all_of(opened(f"{root}/dataset_coco.json:test@{url}/")) == expected
    system.rm(url, recursive=True)


def test_images_that_are_not_where_they_were_looked_for_are_said(root):
    with pytest.raises(
        UserError, match=r"^the images of \S+coco\.json are not .*: there is no \S+/no/val2014/b\.jpg; name"
    ):
        opened(f"{root}/dataset_coco.json@{root}/no")


# --- what a run relies on ---


def test_the_fingerprint_tells_captions_and_splits_apart_and_not_places(root, tmp_path):
    file = f"{root}/dataset_coco.json"
    put(tmp_path / "copy", {"other.json": KARPATHY})
    prints = [opened(spec).fingerprint() for spec in (file, f"{tmp_path}/copy/other.json@{root}")]
    assert prints[0] == prints[1] == json.loads(json.dumps(prints[0]))
    changed = json.loads(json.dumps(KARPATHY).replace("one, two", "one, three"))
    put(root, {"changed.json": changed})
    others = [opened(spec).fingerprint() for spec in (f"{file}:val", f"{root}/changed.json")]
    assert prints[0] not in others
    assert prints[0]["records"] == 2


def test_a_captions_file_can_be_read_by_another_process(root):
    source = opened(f"{root}/dataset_coco.json")
    assert all_of(pickle.loads(pickle.dumps(source))) == all_of(source)


# --- what is refused ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"images": [', r"file\.json is no JSON: "),
        ("[" * 100_000, r"file\.json is no JSON: "),
        ([1, 2], r"file\.json is JSON of another kind; known are Karpathy's JSON .*, COCO's .*, or text of"),
        ({"annotations": []}, "is JSON of another kind"),
        ({"images": [{"id": 1}]}, "is JSON of another kind"),
        ({"images": ["a.jpg"]}, r"images\[0\] is no object"),
        ("", "is neither JSON nor a list of captions; known are Karpathy's"),
        ("a.jpg,a dog\n", "is neither JSON nor a list of captions"),
        (b"\xff\xfe{}", r"file\.json is not UTF-8$"),
        ("image,caption\na.jpg,a\nb.gif,c\n", r"line 3 is 'b\.gif,c'; it must be NAME\.jpg,CAPTION$"),
        ("image,caption\n", r"file\.json has no image with a caption: there is none in it$"),
        ({"images": [entry("a.jpg", "test")]}, r"has no image with a caption: no caption \(1\)$"),
        ({"images": []}, "has no image with a caption"),
        ({"images": [], "annotations": []}, "has no image with a caption"),
        ({"images": [], "annotations": {}}, "annotations is no list"),
        ({"images": [entry("a.jpg", "test", "a") | {"split": 3}]}, r"images\[0\] has no 'split' of the right kind"),
        (
            {"images": [{"sentences": [{}], "filename": "a", "split": "test"}]},
            r"images\[0\]\.sentences\[0\] has no 'raw'",
        ),
        (COCO | {"annotations": [{"image_id": 4, "bbox": []}]}, r"annotations\[0\] has no 'caption' of the right kind"),
        (COCO | {"images": [COCO["images"][0]] * 2}, r"images\[1\] has the id 9 of another image"),
    ],
)
def test_a_file_that_is_of_no_format_or_has_nothing_is_refused_with_why(content, words, root):
    put(root, {"file.json": content})
    with pytest.raises(UserError, match=words) as error:
        opened(f"{root}/file.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{root}/dataset_coco.json:tset", r"coco\.json has no split 'tset'; did you mean 'test'\?$"),
        ("{root}/dataset_coco.json:dev", r"has no split 'dev'; there are: test, train, val$"),
        ("{root}/captions_val2017.json:val", r"val2017\.json has no splits, as its format has none; leave out :val$"),
        ("{root}/flickr_test.txt:test", r"flickr_test\.txt has no splits"),
        ("{root}/dataset_coco.csv", r"^captions:\S+\.csv names no \.json or \.txt; write captions:FILE\.json"),
        ("{root}/dataset_coco.json:", r"names no \.json or \.txt"),
        ("{root}/none.json", r"none\.json cannot be read: No such file"),
    ],
)
def test_a_spec_that_names_nothing_is_refused_with_what_there_is(spec, words, root):
    with pytest.raises(UserError, match=words):
        opened(spec.format(root=root))


def test_a_task_that_needs_labels_is_refused(root):
    with pytest.raises(UserError, match=r"^records of captions: have no label; they have: image, captions$"):
        opened(f"{root}/dataset_coco.json", needs=("image", "label"))
