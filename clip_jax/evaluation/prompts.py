"""The sentences that turn class names into captions; several a class are better than one (CLIP, section 3.1.4).

Short ones are here. The field's own are JSON files of CLIP_benchmark's: class names by data set, and templates by data
set, in which {c} (or {}) is the class name, or for each class its own sentences (CuPL, arXiv 2209.03320).
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.data.sources import Source
from clip_jax.errors import UserError, about, nearest
from clip_jax.files import read_json
from clip_jax.weights.download import Release, cache, fetch

# by data set; {} is the class name
TEMPLATES = {
    "captioned_digits": (
        "a handwritten {}",
        "a scan of the digit {}",
        "a blurry grey picture of a {}",
        "this is the numeral {}",
        "a picture of the handwritten digit {}",
    ),
}
GENERIC = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")

PACKAGE = "clip_benchmark"
REPOSITORY = "https://raw.githubusercontent.com/LAION-AI/CLIP_benchmark/v1.6.2/clip_benchmark/datasets"
USUAL = "imagenet1k"  # whose templates CLIP_benchmark takes for a data set that has none
CLASSNAMES_FILES = {
    PACKAGE: Release(
        f"{REPOSITORY}/en_classnames.json", "73d279021a4bc88059884d01fae66c35ec33793ede8bc9ae54c46632625c4993"
    ),
}
TEMPLATE_FILES = {
    PACKAGE: Release(
        f"{REPOSITORY}/en_zeroshot_classification_templates.json",
        "b78cc883ce1d6aefd304f180046ee25e778d627e099222fbcc57f01657c53c31",
    ),
    "cupl": Release(
        f"{REPOSITORY}/cupl_prompts.json", "6007b74b704b80f6b2a010f3ee94cfd3c381ce2ba487ceb91c292894c311bea5"
    ),
}


class Prompts(NamedTuple):
    """How the classes of a data set are asked for."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...] | Mapping[str, Sequence[str]]  # sentences with {c}, or by class name its own
    sentences: tuple[tuple[str, ...], ...]  # by class
    notes: tuple[str, ...] = ()  # where something else was taken than was looked for, for people


def of(source: Source, classnames: str | None = None, templates: str | None = None) -> Prompts:
    """Returns the prompts of a data set: as the two JSON files say, else as it says itself, else our own short ones.

    A file is given by its path, or "clip_benchmark" and (templates only) "cupl" for that project's: those of the
    installed package, or fetched once from its repository and checked. Of a file, the entry of the data set's name is
    taken, or with "FILE:KEY" another.

    Raises:
        UserError: no such file or entry; class names that do not match the data set's in number; a template without
            {c} or {}; a class without a sentence.
    """
    names, notes = source.classnames, []
    if classnames is not None:
        names, note = _said(classnames, CLASSNAMES_FILES, source, names)
        notes += note
        if source.classnames and len(names) != len(source.classnames):
            raise UserError(
                f"--classnames={classnames} has {len(names)} for {source.name}, whose labels are of "
                f"{len(source.classnames)} classes ({_few(source.classnames)}); both must be in the order of the labels"
            )
    if not names:
        raise UserError(
            f"{source.name}:{source.split} has no class names; give them with --classnames=FILE.json, or try "
            "--task=zeroshot_retrieval"
        )
    said = source.templates or TEMPLATES.get(source.name, GENERIC)
    if templates is not None:
        said, note = _said(templates, TEMPLATE_FILES, source, (), USUAL)
        notes += note
    with about(f"the templates of {templates or source.name}"):
        return Prompts(tuple(names), said, tuple(_sentences(name, said) for name in names), tuple(notes))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _sentences(name: str, templates: Sequence[str] | Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns a class's prompts."""
    if isinstance(templates, Mapping):
        if not templates.get(name):
            raise UserError(f"no sentence for the class {name!r}{nearest(name, templates)}")
        return tuple(templates[name])
    if without := [template for template in templates if "{}" not in template and "{c}" not in template]:
        raise UserError(f"{without[0]!r} has no {{c}} or {{}} where the class name goes")
    return tuple(template.replace("{c}", name).replace("{}", name) for template in templates)


def _said(
    given: str, published: Mapping[str, Release], source: Source, otherwise: Sequence[str], usual: str | None = None
) -> tuple[tuple[str, ...] | dict[str, list[str]], list[str]]:
    """Returns what a file says of a data set: under its name, what follows its last "/", or the usual one's name; and
    a note where it is not the first.

    Raises:
        UserError: it says nothing of it, and there is nothing otherwise; or it is no such file.
    """
    file, key = (given, None) if given in published or Path(given).exists() else _with_key(given)
    content = read_json(_published(published[file]) if file in published else Path(os.path.expanduser(file)))  # noqa: PTH111
    with about(given):
        if not isinstance(content, dict) or not all(map(_is_said, content.values())):
            raise UserError(
                "should be {DATASET: [TEXT, …], …} or, of templates, {DATASET: {CLASS: [TEXT, …], …}, …}, as "
                "CLIP_benchmark's files are"
            )
        keys = [key] if key else [source.name, source.name.rpartition("/")[2], usual]
        entry = next((key for key in keys if key in content), None)
        found = otherwise if entry is None else content[entry]
        if not found:
            raise UserError(f"has nothing for {keys[0]!r}{nearest(keys[0], content)}; {given}:KEY names another entry")
    taken = "the data set's own" if entry is None else f"that of {entry!r}"
    note = [] if entry == keys[0] else [f"{given} has nothing for {keys[0]!r}: {taken} is taken"]
    return found if isinstance(found, dict) else tuple(found), note


def _is_said(value: Any) -> bool:
    """Returns whether a value is texts, or by class texts."""
    several = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in several)


def _with_key(given: str) -> tuple[str, str | None]:
    """Returns (file, key) of "FILE:KEY"."""
    file, colon, key = given.rpartition(":")
    return (file, key) if colon else (given, None)


def _published(release: Release) -> Path:
    """Returns a file of CLIP_benchmark's: the installed package's, or the one that is fetched once.

    Raises:
        UserError: it cannot be fetched, or is not the one that is known.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is not None:
        return Path(package.submodule_search_locations[0]) / "datasets" / release.file
    return fetch(release, cache("prompts"))
