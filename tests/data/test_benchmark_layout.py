"""`wds:ROOT` — data sets as CLIP_benchmark publishes them: its records, its order, and what is said of a bad one."""

import contextlib
import gc
import http.server
import pickle
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tar_shards import picture, tar_of

from clip_jax.data import index_file, storage
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources import Record, Source, benchmark, open_source
from clip_jax.errors import UserError
from clip_jax.evaluation import suite, tasks

SHARDS, EACH = 12, 2
CLASSES = ("cat", "hot dog", "Boeing 737")
TEMPLATES = ("a photo of a {c}.", "{c}")
LABEL, CAPTIONS = ("image", "label"), ("image", "captions")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Where indexes of URLs go."""
    monkeypatch.setenv(index_file.CACHE, str(tmp_path / "cache"))


def put(root: Path, contents: dict[str, str | bytes]) -> Path:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def written(folder: Path, kind: str, contents: list[list[bytes]]) -> None:
    """Writes a split: of each shard what its records have as KEY.cls or KEY.txt, beside an image of its own size."""
    number = 0
    for shard, values in enumerate(contents):
        files = []
        for value in values:
            files += [(f"s{number:07}.webp", picture(5 + number, 9, "WEBP")), (f"s{number:07}.{kind}", value)]
            number += 1
        put(folder, {f"{shard}.tar": tar_of(files)})
    put(folder, {"nshards.txt": f"{len(contents)}\n"})


ABOUT = {"classnames.txt": "cat\n hot dog \nBoeing 737\n", benchmark.TEMPLATES: "a photo of a {c}.\n\n{c}\n"}
WORDS = b"a cat\nan animal, asleep\n\n  two \xe2\x80\x93 words"


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set with labels, of twelve shards."""
    folder = put(tmp_path / "wds_vtab-pets", ABOUT)
    written(folder / "test", "cls", [[b"%d" % ((shard + i) % 3) for i in range(EACH)] for shard in range(SHARDS)])
    return folder


@pytest.fixture
def captioned(tmp_path) -> Path:
    """A data set with captions."""
    folder = put(tmp_path / "wds_flickr", {"dataset_type.txt": "Retrieval\n"})
    written(folder / "test", "txt", [[WORDS, b"one"], [b"last"]])
    return folder


def opened(root: Path | str, needs: tuple[str, ...] = LABEL, split: str = "test") -> Source:
    return open_source(f"wds:{root}", default_split=split, needs=needs)


def all_of(source: Source) -> list[Record]:
    return [source[i] for i in range(len(source))]


def read_by_clip_benchmark(root: Path, kind: str, *, decoded: bool = True) -> list[tuple[bytes, Any]]:
    """Returns (encoded image, label or captions) by webdataset, in CLIP_benchmark's words for it."""
    import webdataset

    shards = int((root / "test/nshards.txt").read_text())
    pattern = f"{root}/test/{{0..{shards - 1}}}.tar"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its shards open
        pairs = webdataset.WebDataset(pattern, nodesplitter=lambda shards: shards, shardshuffle=False)
        found = list((pairs.decode(only=kind) if decoded else pairs).to_tuple("webp;png;jpg;jpeg", kind))
        del pairs
        gc.collect()
    return found


# --- what is read ---


def test_records_are_those_of_clip_benchmarks_own_reader_in_its_order_with_ten_after_two(root):
    source = opened(root)
    assert isinstance(source, Source)
    theirs = read_by_clip_benchmark(root, "cls")
    assert len(theirs) == SHARDS * EACH
    assert [record.label for record in all_of(source)] == [label for _, label in theirs]
    assert [record.id for record in all_of(source)] == [f"s{i:07}" for i in range(SHARDS * EACH)]
    assert [source.shard_of(i) for i in (4, 20)] == ["2.tar", "10.tar"]
    assert {record.captions for record in all_of(source)} == {()}


def test_images_are_those_of_clip_benchmarks_own_reader_byte_for_byte(root):
    images = [image for image, _ in read_by_clip_benchmark(root, "cls", decoded=False)]
    assert [record.image for record in all_of(opened(root))] == images


def test_captions_are_the_lines_of_clip_benchmarks_own_reader_without_the_blank_ones(captioned):
    source = opened(captioned, CAPTIONS)
    theirs = [tuple(line for line in text.splitlines() if line) for _, text in read_by_clip_benchmark(captioned, "txt")]
    assert [record.captions for record in all_of(source)] == theirs
    assert theirs[0] == ("a cat", "an animal, asleep", "  two – words")
    assert {record.label for record in all_of(source)} == {None}
    assert (source.name, source.classnames, source.templates) == ("flickr", (), ())


def test_name_split_classes_and_prompts_are_those_of_the_text_files(root):
    source = opened(root)
    assert (source.name, source.split) == ("vtab-pets", "test")
    assert (source.classnames, source.templates) == (CLASSES, TEMPLATES)
    part = open_source(f"wds:{root}[3:5]", default_split="test", needs=LABEL)
    assert (part.classnames, part.templates, len(part)) == (CLASSES, TEMPLATES, 2)


def test_a_set_without_class_names_and_prompts_has_labels_of_any_number(root):
    for name in ABOUT:
        (root / name).unlink()
    source = opened(root)
    assert (source.classnames, source.templates) == ((), ())
    assert source[1].label == 1


def test_class_names_from_elsewhere_make_it_a_classification(root):
    (root / "classnames.txt").unlink()
    wanted = [suite.Wanted(f"wds:{root}")]
    with pytest.raises(UserError, match="evaluate it with --task=zeroshot_classification"):
        suite.open_all(wanted, tasks.Options())
    [found] = suite.open_all(wanted, tasks.Options(classnames="names.json"))
    assert found.task == "zeroshot_classification"


def test_a_split_is_named_by_its_folder_or_is_the_usual_one(root, monkeypatch):
    shutil.copytree(root / "test", root / "train")
    (root / "train/nshards.txt").write_text("3")
    lengths = {f"{root}": 24, f"{root}/": 24, f"{root}/test": 24, f"{root}/train/": 6}
    assert {spec: len(opened(spec)) for spec in lengths} == lengths
    assert opened(root, split="train").split == opened(root / "train").split == "train"
    monkeypatch.chdir(root)
    assert opened(".").name == opened("train").name == "vtab-pets"
    monkeypatch.setenv("HOME", str(root))
    assert len(opened("~/train")) == 6


def test_what_lies_in_a_folder_as_in_training_is_read_as_in_training(captioned):
    (captioned / "test/nshards.txt").unlink()
    for spec in (captioned / "test", f"{captioned}/test/*.tar", f"{captioned}/test/{{0..1}}.tar"):
        source = opened(spec, CAPTIONS)
        assert [record.captions for record in all_of(source)] == [(WORDS.decode(),), ("one",), ("last",)]
        assert (source.name, source.split, source.templates) == ("test", "all", ())
    put(captioned / "test", {"nshards.txt": "2"})
    assert all_of(opened(f"{captioned}/test/*.tar", CAPTIONS))[0].captions == (WORDS.decode(),)


def test_shards_that_nshards_does_not_count_are_not_read(root):
    (root / "test/nshards.txt").write_text(" 2 \n")
    assert len(opened(root)) == 4


def test_a_data_set_can_be_read_by_another_process(root):
    source = opened(root)
    assert all_of(pickle.loads(pickle.dumps(source))) == all_of(source)


# --- what is left out ---


def test_a_damaged_shard_is_read_up_to_there_and_named(root):
    shard = root / "test/10.tar"
    shard.write_bytes(shard.read_bytes()[:3_000])  # in its second record
    (root / "test/11.tar").write_bytes(b"<html>no tar, however long it is</html>" * 50)
    source = opened(root)
    inventory = source.inventory()
    assert (inventory.shards, set(inventory.broken)) == (SHARDS, {"10.tar", "11.tar"})
    assert inventory.broken["11.tar"] == "no tar header at byte 0"
    assert [record.id for record in all_of(source)] == [f"s{i:07}" for i in range(SHARDS * EACH - 3)]


def test_a_set_of_which_nothing_is_left_is_refused(root):
    written(root / "test", "txt", [[b"a caption"]])
    with pytest.raises(UserError, match=r"^\S+/wds_vtab-pets/test has no record: no label \(1\)$"):
        opened(root)


def test_records_without_a_label_are_left_out_and_counted_as_such(root):
    written(root / "test", "cls", [[b"0", b"", b" \n", b"\xff", b"2"]])
    source = opened(root)
    assert [record.label for record in all_of(source)] == [0, 2]
    assert source.inventory().left_out == {"no label": 2, "label is no class": 1}


def test_a_label_that_is_no_number_is_a_bad_record_and_no_other(root):
    values = [b"1\n", b"cat", b"-1", b"1.0", b"9" * 5000, "٣".encode(), b" 2 "]
    written(root / "test", "cls", [values])
    source = opened(root)
    assert [source[i].label for i in (0, 6)] == [1, 2]
    for i in range(1, 6):
        with pytest.raises(BadRecord) as error:
            source[i]
        assert error.value.problem is Problem.BAD_LABEL


def test_a_label_that_has_no_name_says_that_the_names_are_of_other_data(root):
    written(root / "test", "cls", [[b"2", b"3"]])
    source = opened(root)
    assert source[0].label == 2
    with pytest.raises(UserError, match=r"^label 3 has no name: \S+/wds_vtab-pets/classnames\.txt names 3 classes"):
        source[1]


# --- what is refused ---


def test_a_task_that_needs_what_the_records_have_not_is_refused(root, captioned):
    with pytest.raises(UserError, match=r"^\S+flickr is for zeroshot_retrieval: its records .* and no label; evaluate"):
        opened(captioned)
    with pytest.raises(UserError, match=r"pets is for .*classification: .* and no captions; .*--task=zeroshot_class"):
        opened(root, CAPTIONS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dataset_type.txt", "multilabel\n", r"is multilabel, .* mean average precision, which is not built; choose"),
        ("dataset_type.txt", "video", r"says 'video'; it must say one of: classification, retrieval$"),
        ("test/nshards.txt", "many", r"/test/nshards\.txt says 'many'; it must say how many shards"),
        ("test/nshards.txt", "0", r"says '0'; it must"),
        (
            "test/nshards.txt",
            "14",
            r"nshards\.txt says 14 shards: 2 of 14 files are not there: \S*/12\.tar, \S*13\.tar$",
        ),
        (benchmark.TEMPLATES, "a {c}\na photo\n", r"has the prompt 'a photo'; write \{c\} where"),
        (benchmark.TEMPLATES, "a {} of {c}\n", r"has the prompt 'a \{\} of \{c\}'"),
        ("classnames.txt", b"caf\xe9\n", r"classnames\.txt is not UTF-8$"),
    ],
)
def test_what_is_wrong_with_a_text_file_is_said(name, content, words, root):
    put(root, {name: content})
    with pytest.raises(UserError, match=words):
        opened(root)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(root):
    with pytest.raises(UserError, match=r"pets has no split 'train'; write wds:\S+/SPLIT of one it has: test$"):
        opened(root, split="train")


# --- behind a URL ---


@contextlib.contextmanager
def served(files: dict[str, bytes]) -> Iterator[str]:
    """Yields the address of a server of these files that knows ranges."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path)
            body, status = content or b"", 404 if content is None else 200
            if content is not None and (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")):
                body, status = body[int(asked[1]) : int(asked[2]) + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def tree(root: Path, at: str, *suffixes: str) -> dict[str, bytes]:
    """Returns the files of a data set by their address."""
    return {f"{at}/{f.relative_to(root)}": f.read_bytes() for f in root.rglob("*") if f.suffix in suffixes}


def test_behind_a_url_a_data_set_is_the_same(root):
    (root / "test/nshards.txt").write_text("3")
    expected = all_of(opened(root))
    with served(tree(root, "/sets/wds_pets", ".txt", ".tar")) as address:
        for spec in (f"{address}/sets/wds_pets", f"{address}/sets/wds_pets/test/"):
            source = opened(spec)
            assert (source.name, source.split, source.classnames) == ("pets", "test", CLASSES)
            assert all_of(source) == expected
        with pytest.raises(UserError, match=r"records of wds: have no label"):
            opened(f"{address}/sets")


def test_at_hugging_face_text_lies_in_raw_and_shards_in_resolve(root, monkeypatch):
    (root / "test/nshards.txt").write_text("2")
    expected = all_of(opened(root))
    page = "/datasets/org/wds_vtab-pets"
    files = tree(root, f"{page}/raw/main", ".txt") | tree(root, f"{page}/resolve/main", ".tar")
    files[f"{page}/tree/main/nshards.txt"] = b"<html>a page about the file</html>"
    with served(files) as address:
        monkeypatch.setattr(benchmark, "HUGGING_FACE", f"{address}/datasets")
        for place in ("/tree/main", "", "/tree/main/test", "/tree/main/"):
            source = opened(f"{address}{page}{place}")
            assert (source.name, source.split, source.templates) == ("vtab-pets", "test", TEMPLATES)
            assert all_of(source) == expected
        with pytest.raises(UserError, match=r"there is no \S+/raw/main/train/nshards\.txt that may be read; write"):
            opened(f"{address}{page}/tree/main", split="train")


def test_what_storage_does_not_answer_is_not_taken_for_another_kind_of_data_set(monkeypatch):
    def fail(path: str) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(storage, "read_if_there", fail)
    with pytest.raises(UserError, match=r"^memory://x/test/nshards\.txt cannot be read: no answer$"):
        opened("memory://x")
