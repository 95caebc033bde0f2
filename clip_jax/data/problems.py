"""Why a record is not trained on. The words are what people read: in `metrics.jsonl`, in the doctor's table."""

import enum


class Problem(enum.IntEnum):
    """A reason; the numbers travel with batches, and are never stored."""

    NONE = 0
    NO_IMAGE = 1
    NO_CAPTION = 2
    NOT_TEXT = 3
    LONG_CAPTION = 4
    STATUS = 5
    NOT_JSON = 6
    DUPLICATE = 7
    TOO_SMALL = 8
    TOO_LARGE = 9
    NOT_AN_IMAGE = 10
    DAMAGED = 11
    UNREADABLE = 12
    CHANGED = 13
    NO_LABEL = 14
    BAD_LABEL = 15

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Problem.NONE: "none",
    Problem.NO_IMAGE: "no image",
    Problem.NO_CAPTION: "no caption",
    Problem.NOT_TEXT: "caption is not UTF-8",
    Problem.LONG_CAPTION: "caption over 64 KiB",
    Problem.STATUS: "status is not success",
    Problem.NOT_JSON: "JSON cannot be read",
    Problem.DUPLICATE: "a key twice in one shard",
    Problem.TOO_SMALL: "image too small",
    Problem.TOO_LARGE: "image over the pixel limit",
    Problem.NOT_AN_IMAGE: "not an image",
    Problem.DAMAGED: "damaged image",
    Problem.UNREADABLE: "cannot be read from storage",
    Problem.CHANGED: "shard changed under the run",
    Problem.NO_LABEL: "no label",
    Problem.BAD_LABEL: "label is no class",
}


class BadRecord(Exception):
    """A record that is left out, and why; one is no reason to stop."""

    def __init__(self, problem: Problem):
        super().__init__(problem.words)
        self.problem = problem
