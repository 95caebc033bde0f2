"""What to know of training data before a run: what there is, what is left out, how fast it is read. A picture."""

import collections
import math
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich.console
import rich.filesize
import rich.progress
import rich.table
from matplotlib.figure import Figure

from clip_jax.config import Config
from clip_jax.data.pipeline import Order, TrainingPairs, read, training_pairs
from clip_jax.data.problems import BadRecord, Problem
from clip_jax.data.sources import Source, open_training_source
from clip_jax.data.transforms import header_size
from clip_jax.errors import UserError
from clip_jax.files import read_text, whole
from clip_jax.models.variants import architecture

ROWS, COLUMNS = 4, 6  # pictures that are drawn


class Sample(NamedTuple):
    """What was seen in some records, spread over all."""

    records: int
    sizes: np.ndarray  # [n, 2], width and height
    captions: np.ndarray  # [n], how many a record has
    characters: np.ndarray  # [captions]
    tokens: np.ndarray  # [captions], SOT and EOT counted
    image_bytes: int
    problems: dict[str, int]


def examine(config: Config, *, samples: int, picture: Path) -> None:
    """Prints what there is to know of a config's training data, and draws its first batch.

    Raises:
        UserError: the data cannot be opened, or the picture not be written.
    """
    console = rich.console.Console()
    started = time.monotonic()
    source = open_training_source(config.data)
    seconds = time.monotonic() - started
    arch = architecture(config.model)
    tokenizer = None if config.model.tokenizer is None else read_text(Path(config.model.tokenizer))
    pairs = training_pairs(config, arch, tokenizer, source, rows=range(config.data.global_batch))
    sample = look(source, pairs, samples)
    _print(console, _inventory(config, arch.logit_bias, source, seconds), f"{config.data.train}")
    _print(console, _seen(sample, pairs, source), f"in {sample.records:,} records, spread over all")
    _print(console, _speed(config, pairs, samples), "as it is trained on")
    draw(picture, pairs)
    console.print(f"the first {ROWS * COLUMNS} pairs, as they are trained on: {picture}", highlight=False)


def look(source: Source, pairs: TrainingPairs, samples: int) -> Sample:
    """Returns what is in `samples` records, evenly spread, or in all when there are no more."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(samples, len(source))).astype(np.int64))
    sizes, counts, texts, problems, total = [], [], [], collections.Counter(), 0
    console = rich.console.Console(stderr=True)
    for index in rich.progress.track(indices, "reading", console=console, disable=not console.is_terminal):
        try:
            record = read(source, int(index))
            sizes.append(header_size(record.image))
        except (BadRecord, OSError) as error:
            problems[getattr(error, "problem", Problem.UNREADABLE).words] += 1
            continue
        counts.append(len(record.captions))
        texts += record.captions
        total += len(record.image)
    room = 8 * pairs.context_length  # tokens: enough to see how far captions go over
    ids = pairs.tokenize([*texts, ""], room, True)
    ends = room - np.argmax(ids[:-1, ::-1] != ids[-1, -1], axis=1)  # behind the last that is no padding
    return Sample(
        len(indices),
        np.array(sizes, np.int64).reshape(-1, 2),
        np.array(counts),
        np.array([len(text) for text in texts]),
        ends,
        total,
        dict(problems),
    )


def _print(console: rich.console.Console, rows: Sequence[tuple[str, str]], title: str) -> None:
    table = rich.table.Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, markup=False, highlight=False)
    console.print()


def _first_loss(batch: int, with_bias: bool) -> str:
    """Returns the loss of pairs of which nothing is known yet: cosines of zero."""
    if not with_bias:
        return f"{math.log(batch):.3f} (ln {batch:,})"
    from clip_jax.models.clip import SIGLIP_BIAS_INIT  # brings jax

    right, wrong = np.logaddexp(0, -SIGLIP_BIAS_INIT), np.logaddexp(0, SIGLIP_BIAS_INIT)
    return f"{right + (batch - 1) * wrong:.3f} (of the sigmoid loss with a bias of {SIGLIP_BIAS_INIT:g})"


def _inventory(config: Config, with_bias: bool, source: Source, seconds: float) -> list[tuple[str, str]]:
    inventory, batch = source.inventory(), config.data.global_batch
    rows = [("records", f"{len(source):,} in {inventory.shards:,} shards, opened in {seconds:.1f} s")]
    if inventory.image_bytes is not None:
        rows.append(("bytes", rich.filesize.decimal(inventory.image_bytes)))
    if len(Order.of(source, config.seed).lengths) == 1:
        rows.append(("an epoch", f"{len(source) / batch:,.1f} steps of {batch:,}"))
    rows.append(("expected first loss", _first_loss(batch, with_bias)))
    if downloads := inventory.downloads:
        failed = downloads.get("failed_to_download", 0), downloads.get("failed_to_resize", 0)
        rows.append(
            (
                "img2dataset",
                f"tried {downloads.get('count', 0):,}, of which {failed[0]:,} did not come, "
                f"{failed[1]:,} could not be resized",
            )
        )
    rows += [("left out", f"{count:,}: {words}") for words, count in inventory.left_out.items()]
    rows += [("broken", f"{name} {why}") for name, why in inventory.broken.items()]
    return rows


def _seen(sample: Sample, pairs: TrainingPairs, source: Source) -> list[tuple[str, str]]:
    short, size, length = sample.sizes.min(axis=1, initial=2**31), pairs.image_size, pairs.context_length
    rows = [("bad", f"{count:,}: {words}") for words, count in sample.problems.items()]
    if not len(sample.sizes):
        return rows
    small = f"{(short < size).mean():.1%} are under the model's {size}"
    return [
        *rows,
        (
            "images",
            f"{_range(short)} pixels the shorter side; {small}",
        ),
        ("file", f"{sample.image_bytes / len(short) / 1e3:,.1f} kB on average"),
        ("captions a record", _range(sample.captions)),
        ("characters a caption", _range(sample.characters)),
        ("tokens a caption", f"{_range(sample.tokens)}; {(sample.tokens > length).mean():.1%} are cut at {length}"),
    ]


def _range(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, [5, 50, 95])
    if values.min() == values.max():
        return f"{values[0]:,}"
    return f"{values.min():,} … {middle:,.0f} … {values.max():,} (90 % in {low:,.0f} … {high:,.0f})"


def _speed(config: Config, pairs: TrainingPairs, samples: int) -> list[tuple[str, str]]:
    """Returns how fast one core makes pairs: from storage to crop and tokens."""
    count = min(samples, len(pairs))
    pairs[0]
    started = time.monotonic()
    bad = sum(not pairs[i].batch.valid for i in range(count))
    rate = count / (time.monotonic() - started)
    batch = config.data.global_batch
    rows = [("decoded", f"{rate:,.0f} pairs/s a core; a batch of {batch:,} takes one core {batch / rate:,.2f} s")]
    return rows + ([("bad", f"{bad / count:.1%} of these pairs, left out")] if bad else [])


def draw(path: Path, pairs: TrainingPairs) -> None:
    """Draws the first pairs: images as they are cropped, with the captions that go with them."""
    figure = Figure(figsize=(2 * COLUMNS, 2.75 * ROWS), layout="constrained")
    for i, axes in enumerate(figure.subplots(ROWS, COLUMNS).flat):
        axes.set(xticks=[], yticks=[])
        if i >= len(pairs):
            axes.set_visible(False)
            continue
        pair = pairs[i]
        axes.imshow(pair.batch.image)
        words = pairs.caption(i) if pair.batch.valid else f"left out: {Problem(int(pair.problem)).words}"
        axes.set_xlabel("\n".join(textwrap.wrap(words, 30)[:4]), fontsize=7, parse_math=False)
    try:
        with whole(path) as temporary:
            figure.savefig(temporary, dpi=110)
    except ValueError as error:  # matplotlib's, of a suffix that it does not know
        raise error if isinstance(error, UserError) else UserError(f"cannot draw {path}: {error}") from error
