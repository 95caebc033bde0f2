"""`captions:` — one file that has the captions of images beside it, as the data sets of retrieval are published.

Three formats are told apart by what is in the file: Karpathy's JSON (COCO, Flickr30k, Flickr8k, with their splits),
COCO's own annotations, and the text files that CLIP_benchmark has made of Karpathy's test sets.
"""

import collections
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from clip_jax.data import captions, storage
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources.source import Inventory, Record
from clip_jax.errors import UserError, nearest

# The file ends with the first .json or .txt that a split, a folder or nothing follows.
SPEC = re.compile(r"(?P<file>.+?\.(?:json|txt))(?::(?P<split>[^:@/]+))?(?:@(?P<images>.+))?", re.IGNORECASE)
KNOWN = (
    'Karpathy\'s JSON {"images": [{"filename", "split", "sentences": [{"raw"}]}]}, COCO\'s {"images": [{"id", '
    '"file_name"}], "annotations": [{"image_id", "caption"}]}, or text of a first line "image,caption" and lines '
    '"NAME.jpg,CAPTION"'
)
COUNTS_AS = {"restval": "train"}  # COCO's images that Karpathy left over; whoever trains on his split has them
LINE = re.compile(r"(.+?\.(?:jpe?g|png|webp)),(.*)", re.IGNORECASE)  # captions have commas, and names may
STRAY = "caption of an image that is not listed"


class Captioned(NamedTuple):
    """An image and what is said of it."""

    image: str  # its path in the folder of images
    texts: list[str]


class Found(NamedTuple):
    """What a file has."""

    images: list[Captioned]
    name: str = ""  # what it calls itself
    split: str = "all"
    strays: int = 0  # captions of images that it does not list


class CaptionsFile:
    """Images with all captions that a file has of them, in its order."""

    def __init__(self, spec: str, default_split: str):
        given = SPEC.fullmatch(spec)
        if given is None:
            raise UserError(
                f"captions:{spec} names no .json or .txt; write captions:FILE.json or FILE.txt, then :SPLIT where it "
                "has several, and @FOLDER where its images do not lie beside it"
            )
        path = _expanded(given["file"])
        found = _read(path, given["split"], default_split)
        self._file, self._folder = path, _expanded(given["images"]) or path.rpartition("/")[0]
        self.name, self.split = found.name or storage.name_of(path).rpartition(".")[0], found.split
        self.classnames, self.templates = (), ()
        self._images, self._left_out = _with_captions(found)
        if not self._images:
            raise UserError(f"{path} has no image with a caption: {self.inventory().why_empty()}")
        first = self._path(self._images[0].image)
        if not storage.is_there(first):
            raise UserError(
                f"the images of {path} are not where they were looked for: there is no {first}; name their folder in "
                "captions:FILE:SPLIT@FOLDER, or captions:FILE@FOLDER"
            )

    def __len__(self) -> int:
        return len(self._images)

    def _path(self, image: str) -> str:
        return f"{self._folder}/{image}" if self._folder else image

    def __getitem__(self, index: int) -> Record:
        image, texts = self._images[index]
        if "\0" in image:
            raise BadRecord(Problem.NO_IMAGE)
        try:
            return Record(storage.read(self._path(image)), tuple(texts), None, image)
        except FileNotFoundError as error:
            raise BadRecord(Problem.NO_IMAGE) from error

    def shard_of(self, index: int) -> str:
        return f"{storage.name_of(self._file)}, images {index // 10_000 * 10_000:,} …"

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(self._images).encode()).hexdigest()
        return {"source": "captions", "split": self.split, "records": len(self), "captions": digest}

    def inventory(self) -> Inventory:
        return Inventory(shards=1, left_out=self._left_out)


def _expanded(path: str | None) -> str:
    """Returns a path without `~` and without a slash at its end; none, where there is none."""
    if not path:
        return ""
    return (path if storage.is_url(path) else os.path.expanduser(path)).rstrip("/") or "/"  # noqa: PTH111


def _with_captions(found: Found) -> tuple[list[Captioned], dict[str, int]]:
    """Returns the images that have a caption, and how many have none, by the reason."""
    images, left_out = [], collections.Counter({STRAY: found.strays} if found.strays else {})
    for image, texts in found.images:
        try:
            images.append(Captioned(image, list(captions.of(texts))))
        except BadRecord as error:
            left_out[error.problem.words] += 1
    return images, dict(left_out)


def _read(path: str, split: str | None, default_split: str) -> Found:
    """Returns what a file of any of the formats has.

    Raises:
        UserError: it is of none, or has no such split.
    """
    text = _text(path)
    if text.lstrip()[:1] not in ("{", "["):
        lines = text.split("\n")
        if [word.strip().lower() for word in lines[0].split(",")] != ["image", "caption"]:
            raise UserError(f"{path} is neither JSON nor a list of captions; known are {KNOWN}")
        return _without_splits(path, split, Found(_of_lines(path, lines)))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    known = isinstance(content, dict) and isinstance(content.get("images"), list)
    if known and "annotations" in content:
        return _without_splits(path, split, _of_coco(path, content))
    if known and (not content["images"] or "sentences" in _object(path, content["images"][0], "images[0]")):
        return _of_karpathy(path, content, split or default_split)
    raise UserError(f"{path} is JSON of another kind; known are {KNOWN}")


def _text(path: str) -> str:
    try:
        return storage.patiently(lambda: storage.read(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8") from error
    except OSError as error:
        raise storage.explained(path, error) from error


def _without_splits(path: str, split: str | None, found: Found) -> Found:
    if split is not None:
        raise UserError(f"{path} has no splits, as its format has none; leave out :{split}")
    return found


def _of_karpathy(path: str, content: dict[str, Any], split: str) -> Found:
    of_split = collections.defaultdict(list)
    for where, entry in _objects(path, content["images"], "images"):
        named = _field(path, entry, "split", str, where)
        folder = _field(path, entry, "filepath", str, where) if "filepath" in entry else ""
        name = _field(path, entry, "filename", str, where)
        sentences = _objects(path, _field(path, entry, "sentences", list, where), f"{where}.sentences")
        texts = [_field(path, sentence, "raw", str, place) for place, sentence in sentences]
        of_split[COUNTS_AS.get(named, named)].append(Captioned(f"{folder}/{name}".lstrip("/"), texts))
    if of_split and split not in of_split:
        raise UserError(f"{path} has no split {split!r}{nearest(split, of_split)}")
    name = content.get("dataset")
    return Found(of_split[split], storage.name_of(name) if isinstance(name, str) else "", split)


def _of_coco(path: str, content: dict[str, Any]) -> Found:
    images: dict[int | str, Captioned] = {}
    for where, entry in _objects(path, content["images"], "images"):
        number = _field(path, entry, "id", (int, str), where)
        if number in images:
            raise UserError(f"{path}: {where} has the id {number!r} of another image; ids must be different")
        images[number] = Captioned(_field(path, entry, "file_name", str, where).lstrip("/"), [])
    strays = 0
    for where, entry in _objects(path, content["annotations"], "annotations"):
        text = _field(path, entry, "caption", str, where)
        number = _field(path, entry, "image_id", (int, str), where)
        if number in images:
            images[number].texts.append(text)
        else:
            strays += 1
    return Found(list(images.values()), strays=strays)


def _of_lines(path: str, lines: list[str]) -> list[Captioned]:
    """Returns what lines after the first say; quotes are characters like any other, as CLIP_benchmark reads them."""
    texts = collections.defaultdict(list)
    for number, line in enumerate(lines[1:], 2):
        if not (line := line.strip()):
            continue
        parts = LINE.fullmatch(line)
        if parts is None:
            raise UserError(f"{path}: line {number:,} is {line[:80]!r}; it must be NAME.jpg,CAPTION")
        texts[parts[1].lstrip("/")].append(parts[2])
    return [Captioned(image, said) for image, said in texts.items()]


def _objects(path: str, values: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where it is, object) of a list of objects."""
    if not isinstance(values, list):
        raise UserError(f"{path}: {name} is no list; known are {KNOWN}")
    for i, value in enumerate(values):
        yield f"{name}[{i}]", _object(path, value, f"{name}[{i}]")


def _object(path: str, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where} is no object; known are {KNOWN}")
    return value


def _field(path: str, entry: dict[str, Any], name: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """Returns a field of an object, which must be of these kinds."""
    if not isinstance(entry.get(name), kinds):
        raise UserError(f"{path}: {where} has no {name!r} of the right kind; known are {KNOWN}")
    return entry[name]
