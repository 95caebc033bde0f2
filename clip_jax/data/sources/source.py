"""What every source of records is, wherever they lie: random access, and a fingerprint."""

import collections
import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Record(NamedTuple):
    """One example as it is stored."""

    image: bytes  # an encoded file: PNG, JPEG, …
    captions: tuple[str, ...]  # empty where the data set has none
    label: int | None
    id: str = ""  # what the data set itself calls it, where it does


@dataclasses.dataclass(frozen=True)
class Keys:
    """Where a record has its image and its captions; None: where its kind of source usually has them.

    Several are separated by semicolons: of the images the first that a record has, of the captions all it has.
    """

    image: str | None = None
    captions: str | None = None
    min_image_size: int = 1  # pixels of the shorter side: what is smaller is left out of an index
    max_image_pixels: int = 2**31

    def images_or(self, usual: str) -> tuple[str, ...]:
        return split_keys(self.image or usual)

    def captions_or(self, usual: str) -> tuple[str, ...]:
        return split_keys(self.captions or usual)


def split_keys(keys: str) -> tuple[str, ...]:
    """Returns the keys in "jpg;png"."""
    return tuple(key.strip() for key in keys.split(";") if key.strip())


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What a source has, and what of it is left out, for people."""

    shards: int
    image_bytes: int | None = None  # None: not known without reading all
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)  # records, by reason
    broken: dict[str, str] = dataclasses.field(default_factory=dict)  # shards, and what is wrong with them
    downloads: dict[str, int] = dataclasses.field(default_factory=dict)  # what img2dataset counted

    @classmethod
    def of_all(cls, several: "dict[str, Inventory]") -> "Inventory":
        """Returns that of several sources, by name, together."""
        left_out, downloads = collections.Counter(), collections.Counter()
        for one in several.values():
            left_out.update(one.left_out)
            downloads.update(one.downloads)
        sizes = [one.image_bytes for one in several.values()]
        broken = [(name, shard, why) for name, one in several.items() for shard, why in one.broken.items()]
        return cls(
            shards=sum(one.shards for one in several.values()),
            image_bytes=None if None in sizes else sum(sizes),
            left_out=dict(left_out.most_common()),
            broken={f"{name}/{shard}".rstrip("/"): why for name, shard, why in broken},
            downloads=dict(downloads),
        )

    def said(self, shown: int = 5) -> list[str]:
        """Returns a line for every reason, and for the first broken shards."""
        lines = [f"  left out: {words} {count:,}" for words, count in self.left_out.items()]
        lines += [f"  {name} {why}" for name, why in list(self.broken.items())[:shown]]
        return lines + ([f"  and {len(self.broken) - shown:,} more"] if len(self.broken) > shown else [])

    def why_empty(self, shown: int = 5) -> str:
        """Returns in a line why nothing is left of a source."""
        reasons = [f"{words} ({count:,})" for words, count in self.left_out.items()]
        reasons += [f"{name} {words}" for name, words in self.broken.items()]
        return "; ".join(reasons[:shown]) + ("; …" if len(reasons) > shown else "") or "there is none in it"


@runtime_checkable
class Source(Protocol):
    """Random access to records, picklable, so that worker processes can open their own."""

    name: str  # without the kind: "captioned_digits"
    split: str
    classnames: tuple[str, ...]  # by label; empty where records have none
    templates: tuple[str, ...]  # the data set's own prompts, {c} for the class; empty where it comes with none

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Returns a record.

        Raises:
            BadRecord: this one is to be left out.
            OSError: storage does not answer.
        """
        ...

    def shard_of(self, index: int) -> str:
        """Returns where a record lies, for people who look for what is wrong there."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Returns what must be equal for a run to go on with the same data: plain JSON values."""
        ...

    def inventory(self) -> Inventory: ...
