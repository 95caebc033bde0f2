"""`wds:` — data sets for evaluation as CLIP_benchmark publishes them: tar shards, and text files beside them.

    ROOT/classnames.txt                             a class a line, by label
    ROOT/zeroshot_classification_templates.txt      a prompt a line, {c} for the class
    ROOT/dataset_type.txt                           classification where there is none, or retrieval
    ROOT/test/nshards.txt                           how many shards the split has
    ROOT/test/0.tar                                 s0000000.webp, s0000000.cls (the label) or s0000000.txt (captions)

The records are those of the same tar shards in training, by the same indexes, in the order in which CLIP_benchmark
reads them: that of the shards' numbers.
"""

import dataclasses
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.data import storage
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources.shards import TarShards
from clip_jax.data.sources.source import Inventory, Keys, Record
from clip_jax.errors import UserError

HUGGING_FACE = "https://huggingface.co/datasets"
COUNT, CLASSNAMES, TEMPLATES = "nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
IMAGES = "webp;png;jpg;jpeg"
HAVE = {"classification": "label", "retrieval": "captions"}  # by what is in dataset_type.txt, beside an image
FILES = {"label": "cls", "captions": "txt"}
# Of labels, what an index says of captions.
OF_LABELS = {
    Problem.NO_CAPTION.words: Problem.NO_LABEL.words,
    Problem.NOT_TEXT.words: Problem.BAD_LABEL.words,
    Problem.LONG_CAPTION.words: Problem.BAD_LABEL.words,
}


class Layout(NamedTuple):
    """Where a data set lies."""

    name: str
    split: str
    about: str  # the folder of its text files
    tars: str  # that of its splits' shards: the same but at Hugging Face
    shards: int


def find(place: str, default_split: str) -> Layout | None:
    """Returns the data set whose root a path or URL is, or a split of whose it is; None: it is anything else.

    Raises:
        UserError: it is the root of one that has no such split, or what says how many shards there are does not.
    """
    if storage.is_url(place):
        place = place.rstrip("/")
        possible = not place.endswith(".tar") and re.search(r"[*?\[{]", place) is None
    else:
        place = str(Path(place).expanduser().absolute())
        possible = os.path.isdir(place)  # noqa: PTH112 (a pattern may be too long for a Path to look at)
    if not possible:
        return None
    folder, _, last = place.rpartition("/")
    for root, split in ((place, default_split), (folder, last)):
        if (_at_hugging_face(place) and not _at_hugging_face(root)) or not split:
            continue
        about, tars, name = _folders(root)
        if (count := _text(f"{about}/{split}/{COUNT}")) is not None:
            return Layout(name, split, about, tars, _number(count, f"{about}/{split}/{COUNT}"))
    _refuse_without_split(place, default_split)
    return None


def _at_hugging_face(place: str) -> re.Match | None:
    """Returns (URL of the data set, branch and folder) of a page there, as groups."""
    return re.fullmatch(rf"({re.escape(HUGGING_FACE)}/[^/]+/[^/]+)(?:/tree/(.+))?", place)


def _folders(root: str) -> tuple[str, str, str]:
    """Returns the folder of a root's text files, that of its shards, and its name.

    At Hugging Face large files lie elsewhere: what a page calls `tree` is `raw` for text and `resolve` for shards.
    """
    about, tars, named = root, root, root
    if page := _at_hugging_face(root):
        url, inside = page[1], page[2] or "main"
        about, tars = f"{url}/raw/{inside}", f"{url}/resolve/{inside}"
        named = root if "/" in inside else url
    return about, tars, storage.name_of(named).removeprefix("wds_") or "shards"


def _refuse_without_split(place: str, split: str) -> None:
    """Raises UserError for a root that has other splits only."""
    if _at_hugging_face(place):
        count = f"{_folders(place)[0]}/{split}/{COUNT}"
        raise UserError(f"there is no {count} that may be read; write wds:{place}/SPLIT of a split that it has")
    if storage.is_url(place) or next(Path(place).glob("*.tar"), None):
        return
    if known := sorted(count.parent.name for count in Path(place).glob(f"*/{COUNT}")):
        raise UserError(f"{place} has no split {split!r}; write wds:{place}/SPLIT of one it has: {', '.join(known)}")


def _text(path: str) -> str | None:
    """Returns what a small file says; None: there is none.

    Raises:
        UserError: it is no text, or storage does not answer.
    """
    try:
        data = storage.read_if_there(path)
        return None if data is None else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8") from error
    except (PermissionError, NotADirectoryError):  # what some servers say of what is not there
        return None
    except OSError as error:
        raise storage.explained(path, error) from error


def _lines(path: str) -> list[str]:
    return [line.strip() for line in (_text(path) or "").rstrip().splitlines()]


def _number(text: str, path: str) -> int:
    if re.fullmatch(r"0*[1-9][0-9]{0,6}", text.strip()) is None:
        raise UserError(f"{path} says {text.strip()[:40]!r}; it must say how many shards there are: 0.tar, 1.tar …")
    return int(text)


class BenchmarkShards:
    """A split of a data set of CLIP_benchmark's: images with labels, or images with captions."""

    def __init__(self, layout: Layout, needs: Collection[str], keys: Keys):
        self.name, self.split, self._about = layout.name, layout.split, layout.about
        self._has = _what_it_has(layout.about, needs)
        self.classnames, self.templates = (), ()
        if self._has == "label":
            self.classnames, self.templates = tuple(_lines(f"{layout.about}/{CLASSNAMES}")), _templates(layout.about)
        usual = FILES[self._has]
        texts = keys.captions or usual if self._has == "captions" else usual
        keys = dataclasses.replace(keys, image=keys.image or IMAGES, captions=texts)
        self._records = TarShards(_shards(layout), keys)
        if not len(self):
            raise UserError(f"{layout.tars}/{self.split} has no record: {self.inventory().why_empty()}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Returns a record.

        Raises:
            BadRecord: this one is to be left out.
            UserError: its label is of a class that has no name.
            OSError: storage does not answer.
        """
        record = self._records[index]
        if self._has == "label":
            return record._replace(captions=(), label=self._label(record.captions[0]))
        lines = [line for text in record.captions for line in text.splitlines()]
        return record._replace(captions=tuple(line for line in lines if line.strip()))

    def _label(self, text: str) -> int:
        if re.fullmatch(r"[0-9]{1,9}", text.strip()) is None:
            raise BadRecord(Problem.BAD_LABEL)
        label = int(text)
        if self.classnames and label >= len(self.classnames):
            raise UserError(
                f"label {label} has no name: {self._about}/{CLASSNAMES} names {len(self.classnames):,} classes, from 0 "
                "on; the names are not those of these records"
            )
        return label

    def shard_of(self, index: int) -> str:
        return self._records.shard_of(index)

    def fingerprint(self) -> dict[str, Any]:
        return self._records.fingerprint()

    def inventory(self) -> Inventory:
        found = self._records.inventory()
        if self._has == "captions":
            return found
        left_out: dict[str, int] = {}
        for words, count in found.left_out.items():
            words = OF_LABELS.get(words, words)
            left_out[words] = left_out.get(words, 0) + count
        return dataclasses.replace(found, left_out=left_out)


def _what_it_has(about: str, needs: Collection[str]) -> str:
    """Returns what the records have beside their image: "label" or "captions".

    Raises:
        UserError: that is not what is needed, or a kind of data set that cannot be evaluated.
    """
    path = f"{about}/{TYPE}"
    said = (_text(path) or "classification").strip().lower()
    if said == "multilabel":
        raise UserError(
            f"{about} is multilabel, as its {TYPE} says: it is measured by mean average precision, which is not "
            "built; choose a data set of one label an image"
        )
    if said not in HAVE:
        raise UserError(f"{path} says {said[:40]!r}; it must say one of: {', '.join(HAVE)}")
    if missing := [need for need in needs if need not in ("image", HAVE[said])]:
        lacks = " and no ".join(missing)
        raise UserError(
            f"{about} is for zeroshot_{said}: its records have an image and {HAVE[said]}, and no {lacks}; evaluate it "
            f"with --task=zeroshot_{said}"
        )
    return HAVE[said]


def _templates(about: str) -> tuple[str, ...]:
    """Returns the prompts as they are written, {c} for the class."""
    path = f"{about}/{TEMPLATES}"
    templates = tuple(line for line in _lines(path) if line)
    for template in templates:
        if "{c}" not in template or re.search(r"[{}]", template.replace("{c}", "")):
            raise UserError(f"{path} has the prompt {template!r}; write {{c}} where the name of the class belongs")
    return templates


def _shards(layout: Layout) -> list[storage.File]:
    """Returns the shards by their number: 10.tar comes after 2.tar."""
    folder = f"{layout.tars}/{layout.split}"
    try:
        return storage.look_up([f"{folder}/{number}.tar" for number in range(layout.shards)])
    except UserError as error:
        raise UserError(f"{layout.about}/{layout.split}/{COUNT} says {layout.shards:,} shards: {error}") from error
