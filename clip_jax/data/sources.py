"""Data sets as random access to encoded records: `source[i]` is the bytes of an image, its captions and its label.

A spec names one: `tfds:NAME[:SPLIT]`. Everything downstream sees only `Source`.
"""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import filelock
import numpy as np

from clip_jax.data.embedded import EMBEDDED, register
from clip_jax.errors import UserError, nearest


class Record(NamedTuple):
    """One example as it is stored."""

    image: bytes  # an encoded file: PNG, JPEG, …
    captions: tuple[str, ...]  # empty where the data set has none
    label: int | None
    id: str = ""  # what the data set itself calls it, where it does


@runtime_checkable
class Source(Protocol):
    """Random access to records, picklable, so that worker processes can open their own."""

    name: str  # without the kind: "captioned_digits"
    split: str
    classnames: tuple[str, ...]  # by label; empty where records have none

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def fingerprint(self) -> dict[str, Any]:
        """Returns what must be equal for a run to go on with the same data: plain JSON values."""
        ...


def open_source(
    spec: str | None,
    *,
    data_dir: str | None = None,
    default_split: str = "train",
    needs: Collection[str] = ("image", "captions"),
) -> Source:
    """Returns the data set that a spec names; an embedded one is made on first use. `needs` is what its records must
    have, of "image", "captions" and "label".

    Raises:
        UserError: the spec is malformed, or no such data set, split or feature exists; the message lists those that do.
    """
    if spec is None:
        raise UserError("this recipe comes without data: name yours, --config.data.train=tfds:NAME:SPLIT")
    kind, _, rest = spec.partition(":")
    if kind != "tfds" or not rest:
        raise UserError(f"{spec!r} is not a data set; write tfds:NAME[:SPLIT], such as tfds:captioned_digits:test")
    name, _, split = rest.partition(":")
    return TfdsSource(name, split or default_split, data_dir, needs)


class TfdsSource:
    """A TFDS data set prepared as ArrayRecord, read without TensorFlow; images stay encoded."""

    def __init__(self, name: str, split: str, data_dir: str | None, needs: Collection[str]):
        import tensorflow_datasets as tfds

        builder = _builder(name, data_dir)
        if split not in builder.info.splits:
            raise UserError(f"data set {name!r} has no split {split!r}{nearest(split, builder.info.splits)}")
        self.name, self.split = name, split
        features = builder.info.features
        if missing := [key for key in needs if key not in features]:
            raise UserError(f"{name!r} has no feature {' and no '.join(missing)}; it has: {', '.join(features)}")
        self.classnames = tuple(features["label"].names) if "label" in features else ()
        self._version = str(builder.info.version)
        self._has_ids = isinstance(dict(features).get("id"), tfds.features.Text)
        self._shard_lengths = [int(n) for n in builder.info.splits[split].shard_lengths]
        try:
            self._records: Sequence[dict] = builder.as_data_source(
                split=split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise UserError(
                f"{name!r} lies in {builder.data_path} as {builder.info.file_format.value}, which cannot be read by "
                f"index; prepare it in another data_dir with {_preparation(name, '…')}"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        captions = tuple(bytes(caption).decode() for caption in np.atleast_1d(record.get("captions", ())))
        label = record.get("label")
        id = record["id"].decode() if self._has_ids else ""
        return Record(record["image"], captions, None if label is None else int(label), id)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "source": f"tfds:{self.name}:{self.split}",
            "version": self._version,
            "shard_lengths": self._shard_lengths,
        }


def _builder(name: str, data_dir: str | None):
    """Returns the builder of a data set that is ready to be read; makes an embedded one."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    if name in EMBEDDED:
        register(name)
        folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / f".{name}.lock"):  # of several processes, one makes it
                builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
                builder.download_and_prepare()
        except OSError as error:
            raise UserError(f"cannot make data set {name!r}: {error}; choose another data_dir") from error
        return builder
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        builder = None
    # Not `is_prepared`: it logs a line of its own.
    if builder is None or not (builder.data_path / tfds.core.constants.DATASET_INFO_FILENAME).exists():
        known = sorted({*EMBEDDED, *prepared(data_dir)})
        how = f" with {_preparation(name, data_dir)}" if builder else ""
        raise UserError(
            f"no data set {name!r}; there are: {', '.join(known)} (others are read once TFDS has prepared them{how})"
        )
    return builder


def _preparation(name: str, data_dir: str | None) -> str:
    """Returns how TFDS is told to make a data set that can be read by index."""
    place = f", data_dir={data_dir!r}" if data_dir else ""
    call = f"tfds.builder({name!r}{place}, file_format='array_record').download_and_prepare()"
    return f"{call}, which may need TensorFlow"


def prepared(data_dir: str | None) -> list[str]:
    """Returns the names of the data sets that lie ready in TFDS's folder."""
    import tensorflow_datasets as tfds

    folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    return sorted({info.parents[1].name for info in folder.glob("*/*/dataset_info.json")}) if folder.is_dir() else []
