"""`tfds:` — TFDS data sets prepared as ArrayRecord, read by index, without TensorFlow; and those that ship with us."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from clip_jax.data import captions
from clip_jax.data.embedded import EMBEDDED, register
from clip_jax.data.sources.source import Inventory, Keys, Record
from clip_jax.errors import UserError, nearest


class TfdsSource:
    """A TFDS data set prepared as ArrayRecord, read without TensorFlow; images stay encoded."""

    def __init__(self, name: str, split: str, data_dir: str | None, needs: Collection[str], keys: Keys):
        import tensorflow_datasets as tfds

        builder = _builder(name, data_dir)
        if split not in builder.info.splits:
            raise UserError(f"data set {name!r} has no split {split!r}{nearest(split, builder.info.splits)}")
        self.name, self.split = name, split
        features = builder.info.features
        self._image = next((key for key in keys.images_or("image") if key in features), None)
        paths = [key.split(".") for key in keys.captions_or("captions;captions.text;caption")]
        self._captions = [path for path in paths if path[0] in features]
        self._needs_captions = "captions" in needs
        present = {"image": self._image, "captions": self._captions}
        named = {"image": keys.image or "image", "captions": keys.captions or "captions"}
        if missing := [named.get(need, need) for need in needs if not present.get(need, need in features)]:
            raise UserError(f"{name!r} has no feature {' and no '.join(missing)}; it has: {', '.join(features)}")
        self.classnames = tuple(features["label"].names) if "label" in features else ()
        self.templates: tuple[str, ...] = ()
        self._version = str(builder.info.version)
        self._has_ids = isinstance(dict(features).get("id"), tfds.features.Text)
        self._size = builder.info.splits[split].num_bytes
        self._shard_lengths = [int(n) for n in builder.info.splits[split].shard_lengths]
        try:
            self._records: Sequence[dict] = builder.as_data_source(
                split=split, decoders={self._image: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise UserError(
                f"{name!r} lies in {builder.data_path} as {builder.info.file_format.value}, which cannot be read by "
                f"index; prepare it in another data_dir with {_preparation(name, '…')}"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            record = self._records[index]
        except RuntimeError as error:  # what ArrayRecord raises for anything
            raise OSError(str(error)) from error
        texts = [text for name, *path in self._captions for text in captions.within(record[name], path)]
        said = any(text.strip() for text in texts)
        found = captions.of(texts) if said or self._needs_captions else ()
        label = record.get("label")
        id = record["id"].decode() if self._has_ids else ""
        return Record(record[self._image], found, None if label is None else int(label), id)

    def shard_of(self, index: int) -> str:
        shard = int(np.searchsorted(np.cumsum(self._shard_lengths), index, "right"))
        return f"{self.name}:{self.split}, shard {shard} of {len(self._shard_lengths)}"

    def fingerprint(self) -> dict[str, Any]:
        return {
            "source": f"tfds:{self.name}:{self.split}",
            "version": self._version,
            "shard_lengths": self._shard_lengths,
        }

    def inventory(self) -> Inventory:
        return Inventory(shards=len(self._shard_lengths), image_bytes=self._size)


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
