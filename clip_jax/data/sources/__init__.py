"""Data sets as random access to encoded records: `source[i]` is the bytes of an image, its captions and its label.

A spec names one, and everything downstream sees only `Source`:

    tfds:NAME[:SPLIT]                     a data set of TFDS
    wds:FOLDER, GLOB or {000..127}.tar    tar shards, local or a URL
    wds:ROOT[/SPLIT]                      a data set in CLIP_benchmark's layout of tar shards, local or a URL
    folder:DIR                            one sub-folder a class
    csv:FILE                              a table of paths and captions: csv, tsv or parquet
    captions:FILE[:SPLIT][@FOLDER]        Karpathy's or COCO's .json, Flickr's .txt; the folder is that of the images
    SPEC[1000:2000]                       a range of one
    SPEC + SPEC                           all of their records
    3 * SPEC + 1 * SPEC                   three of the first for each of the second
"""

import re
from collections.abc import Collection
from fractions import Fraction
from typing import NamedTuple

from clip_jax.config import DataConfig
from clip_jax.data.sources.mixture import Mixture, Range
from clip_jax.data.sources.source import Inventory, Keys, Record, Source
from clip_jax.errors import UserError

__all__ = ["Inventory", "Keys", "Record", "Source", "open_source", "open_training_source"]


def open_source(
    spec: str | None,
    *,
    data_dir: str | None = None,
    default_split: str = "train",
    needs: Collection[str] = ("image", "captions"),
    keys: Keys = Keys(),  # noqa: B008 (frozen)
) -> Source:
    """Returns the data set that a spec names; an embedded one is made on first use, an index where it is missing.

    `needs` is what its records must have, of "image", "captions" and "label"; `keys` says where they have it.

    Raises:
        UserError: the spec is malformed, or no such data set, file, split or feature exists; says which there are.
    """
    if spec is None:
        raise UserError("this recipe comes without data: name yours, such as --config.data.train=wds:FOLDER_OF_TARS")

    request = Request(data_dir, default_split, needs, keys)

    def opened(part: str) -> Source:
        part, first, last = _range(part)
        kind, _, rest = part.partition(":")
        if kind not in KINDS or not rest:
            raise UserError(
                f"{part!r} is not a data set; write tfds:NAME[:SPLIT], wds:FOLDER_OF_TARS, folder:DIR, csv:FILE or "
                "captions:FILE, such as tfds:captioned_digits:test"
            )
        source = KINDS[kind](rest, request)
        return source if first is last is None else Range(source, first, last)

    weighted = [_weight(part) for part in spec.split(" + ")]
    weights = [weight for weight, _ in weighted]
    if len(weighted) == 1:
        return opened(weighted[0][1])
    if None in weights and set(weights) != {None}:
        raise UserError(f"{spec!r} gives a weight to some of its data sets only; give one to all, or to none")
    return Mixture([opened(part) for _, part in weighted], None if None in weights else weights)


def open_training_source(data: DataConfig) -> Source:
    """Returns the records to train on."""
    keys = Keys(data.image_keys, data.caption_keys, data.min_image_size, data.max_image_pixels)
    return open_source(data.train, data_dir=data.data_dir, keys=keys)


def _weight(part: str) -> tuple[Fraction | None, str]:
    """Returns (weight, spec) of "3 * SPEC"."""
    given = re.fullmatch(r"\s*([\d.]+)\s*\*\s*(\w+:.*)", part)
    if given is None:
        return None, part.strip()
    try:
        weight = Fraction(given[1])
    except ValueError:
        weight = Fraction(0)
    if not weight:
        raise UserError(f"the weight {given[1]} of {given[2]!r} must be a number above 0")
    return weight, given[2].strip()


def _range(part: str) -> tuple[str, int | None, int | None]:
    """Returns (spec, first, last) of "SPEC[first:last]"."""
    given = re.fullmatch(r"(.*)\[(\d*):(\d*)\]", part)
    if given is None:
        return part, None, None
    first, last = (int(bound) if bound else None for bound in given.groups()[1:])
    return given[1], first, last


class Request(NamedTuple):
    """How a part of a spec is to be opened."""

    data_dir: str | None
    default_split: str
    needs: Collection[str]
    keys: Keys

    def check(self, kind: str, known: Collection[str]) -> None:
        """Raises UserError when the records of a kind of source do not have what is needed."""
        if missing := [need for need in self.needs if need not in known]:
            raise UserError(f"records of {kind}: have no {' and no '.join(missing)}; they have: {', '.join(known)}")


def _tfds(rest: str, request: Request) -> Source:
    from clip_jax.data.sources.tfds import TfdsSource

    name, _, split = rest.partition(":")
    return TfdsSource(name, split or request.default_split, request.data_dir, request.needs, request.keys)


def _shards(rest: str, request: Request) -> Source:
    from clip_jax.data.sources import benchmark, shards

    if layout := benchmark.find(rest, request.default_split):
        return benchmark.BenchmarkShards(layout, request.needs, request.keys)
    request.check("wds", ("image", "captions"))
    return shards.matching(rest, request.keys)


def _folder(rest: str, request: Request) -> Source:
    from clip_jax.data.sources.folder import ImageFolder

    request.check("folder", ("image", "captions", "label"))
    return ImageFolder(rest, request.keys)


def _table(rest: str, request: Request) -> Source:
    from clip_jax.data.sources.table import Table

    request.check("csv", ("image", "captions"))
    return Table(rest, request.keys)


def _captions(rest: str, request: Request) -> Source:
    from clip_jax.data.sources.captions_file import CaptionsFile

    request.check("captions", ("image", "captions"))
    return CaptionsFile(rest, request.default_split)


# Imported where used: a second each.
KINDS = {"tfds": _tfds, "wds": _shards, "folder": _folder, "csv": _table, "captions": _captions}
