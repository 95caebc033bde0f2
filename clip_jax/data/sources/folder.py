"""`folder:` — images in one sub-folder a class, as they lie in many data sets with labels."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clip_jax.data import captions, storage
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources.source import Inventory, Keys, Record
from clip_jax.errors import UserError


class ImageFolder:
    """Images in one sub-folder a class; the caption is what a .txt file of the same name says, else the class."""

    def __init__(self, folder: str, keys: Keys):
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"there is no folder {folder!r}; write folder:DIR, with one sub-folder of images a class")
        suffixes = {f".{key.lower()}" for key in keys.images_or("jpg;jpeg;png;webp")}
        self.classnames = tuple(
            sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        )
        self._root, self._caption_suffixes = root, [f".{key}" for key in keys.captions_or("txt")]
        self._files = [
            (label, file.relative_to(root).as_posix(), size)
            for label, name in enumerate(self.classnames)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in suffixes and (size := _size(file)) is not None
        ]
        if not self._files:
            raise UserError(
                f"no sub-folder of {folder!r} has an image ({', '.join(sorted(suffixes))}); there must be one "
                "sub-folder a class"
            )
        self.name, self.split, self.templates = root.resolve().name, "all", ()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        label, file, _ = self._files[index]
        path = self._root / file
        beside = (storage.read_if_there(str(path.with_suffix(suffix))) for suffix in self._caption_suffixes)
        texts = [text for text in beside if text is not None] or [self.classnames[label].replace("_", " ")]
        try:
            return Record(storage.read(str(path)), captions.of(texts), label, file)
        except FileNotFoundError as error:
            raise BadRecord(Problem.NO_IMAGE) from error

    def shard_of(self, index: int) -> str:
        return self.classnames[self._files[index][0]]

    def fingerprint(self) -> dict[str, Any]:
        files = _digest((file, size) for _, file, size in self._files)
        return {"source": "folder", "records": len(self), "files": files}

    def inventory(self) -> Inventory:
        return Inventory(shards=len(self.classnames), image_bytes=sum(size for _, _, size in self._files))


def _size(file: Path) -> int | None:
    """Returns the bytes of a file, none for a link that leads nowhere; None: it is a folder."""
    try:
        status = file.stat()
    except FileNotFoundError:  # a record that cannot be read, and no reason to stop
        return 0
    return None if stat.S_ISDIR(status.st_mode) else status.st_size


def _digest(facts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps(fact).encode())
    return digest.hexdigest()
