"""Images and captions to features, ViT-B/32 in float32, the same inputs on all sides; and the features are the same."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import peers
from groups import models
from peers import OURS
from side_by_side import Row, in_turns

BATCHES = {True: (1, 32), False: (1, 32, 256)}  # by whether it is to be quick
ROUNDS = {1: 30, 32: 9, 256: 3}
LENGTHS = (77, 20)  # tokens of the longest caption
BARS = {("image", 1): 0.9, ("text", 1): 0.9}  # at others 1
SHORT_BAR = 2.5
CLOSE = 1e-4  # of the largest feature


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields a row for each batch size, of images, of captions, and of short ones."""
    paths = models.write_all(models.drawn("ViT-B/32"), folder)
    made, gaps = peers.available(functools.partial(_encoders, paths=paths), paths)
    for batch in BATCHES[quick]:
        images = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)
        jobs = {who: encoder.image(images) for who, encoder in made.items()}
        name = f"encode_image, {batch} at once"
        yield _row(name, jobs, ROUNDS[batch], BARS.get(("image", batch), 1.0), gaps)
    for longest in LENGTHS:
        for batch in BATCHES[quick]:
            tokens = captions(batch, longest)
            jobs = {who: encoder.text(tokens) for who, encoder in made.items()}
            bar = BARS.get(("text", batch), 1.0) if longest == 77 else SHORT_BAR
            yield _row(f"encode_text, {batch} of at most {longest} tokens", jobs, ROUNDS[batch], bar, gaps)


def _encoders(who: str, paths: Mapping[str, Path]) -> models.Encoders:
    return models.encoders(who, peers.load(who, peers.imported(who), paths[who]))


def _row(name: str, jobs: dict, rounds: int, bar: float | None, gaps: dict[str, str]) -> Row:
    features = {who: job() for who, job in jobs.items()}
    for who, found in features.items():
        difference = np.abs(found - features[OURS]).max() / np.abs(features[OURS]).max()
        assert difference <= CLOSE, f"{name}: {who}'s features are {difference:.1e} from ours"
    return Row(name, in_turns(jobs, rounds), bar=bar, gaps=gaps)


def captions(batch: int, longest: int, context_length: int = 77) -> np.ndarray:
    """Returns tokens of captions, the first as long as asked, others from half of that on."""
    random = np.random.default_rng(1)
    tokens = np.zeros((batch, context_length), np.int32)
    lengths = random.integers(longest // 2, longest + 1, batch)
    lengths[0] = longest
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = [49406, *random.integers(1000, 40000, length - 2), 49407]
    return tokens
