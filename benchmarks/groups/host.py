"""What a host does for each pair: captions to ids, and encoded pictures to the normalised pixels that a model is
evaluated on. On one thread; the same ids, and of those that use PIL the same pixels."""

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import peers
import training_shards
from groups import models
from peers import OURS
from PIL import Image
from side_by_side import Row, in_turns

from clip_jax.models.variants import VARIANTS

CAPTIONS = ("a photo of a {}.", "the {} on the left, seen from above", "two {}s and a small dog near the old harbour")
WORDS = ("cat", "sailing boat", "teapot", "lighthouse", "bicycle", "violin", "pepper", "street", "cloud", "mountain")
TEXTS = {True: 2_000, False: 20_000}  # by whether it is to be quick
PICTURES, SHORT = {True: 16, False: 64}, 640
ROUNDS = 5


def rows(quick: bool, folder: Path) -> Iterator[Row]:
    """Yields a row of captions and one of pictures."""
    random = np.random.default_rng(0)
    texts = [str(random.choice(CAPTIONS)).format(" and ".join(random.choice(WORDS, 2))) for _ in range(TEXTS[quick])]
    made, gaps = peers.available(_tokenizer, (OURS, *peers.MODULES))
    ids = {who: tokenize(texts[:100]) for who, tokenize in made.items()}
    assert all((found == ids[OURS]).all() for found in ids.values()), "not the same ids"
    jobs = {who: lambda call=call: call(texts) for who, call in made.items()}
    yield Row(f"tokenize {len(texts):,} captions, warm", in_turns(jobs, ROUNDS), gaps=gaps)

    files = [training_shards.picture(random, SHORT) for _ in range(PICTURES[quick])]
    made, gaps = peers.available(_preprocess, (OURS, *peers.MODULES))
    pixels = {who: call(files[0]) for who, call in made.items()}
    for who in pixels.keys() & {"OpenAI", "OpenCLIP"}:  # transformers' resizes by torchvision
        difference = np.abs(pixels[who] - pixels[OURS].transpose(2, 0, 1)).max()
        assert difference < 1e-6, f"{who}'s pixels are {difference} from ours"
    jobs = {who: lambda call=call: [call(file) for file in files] for who, call in made.items()}
    yield Row(f"{len(files)} JPEGs of {SHORT} px to 224 × 224", in_turns(jobs, ROUNDS), gaps=gaps)


def _tokenizer(who: str) -> Callable[[list[str]], np.ndarray]:
    """Returns the function from captions to ids, 77 for each; its package is there."""
    if who == OURS:
        import clip_jax

        return lambda texts: np.asarray(clip_jax.tokenize(texts))
    package = peers.module(who)
    if who == "OpenAI":
        return lambda texts: package.tokenize(texts).numpy()
    if who == "OpenCLIP":
        tokenize = package.get_tokenizer("ViT-B-32")
        return lambda texts: tokenize(texts).numpy()
    with tempfile.TemporaryDirectory() as folder:  # its own words, as our export writes them for it
        from clip_jax.weights import huggingface

        huggingface.write(Path(folder) / "model", models.drawn("ViT-B/32"))
        tokenize = package.AutoTokenizer.from_pretrained(Path(folder) / "model")

    def ids(texts: list[str]) -> np.ndarray:
        found = tokenize(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np")
        return found["input_ids"] * found["attention_mask"]  # it fills up with another id

    return ids


def _preprocess(who: str) -> Callable[[bytes], np.ndarray]:
    """Returns the function from an encoded picture to pixels; its package is there."""
    if who == OURS:
        from clip_jax.api import ImagePreprocess

        transform = ImagePreprocess(VARIANTS["ViT-B/32"])
        return lambda file: transform(Image.open(io.BytesIO(file)))
    package = peers.module(who)
    import torch

    torch.set_num_threads(1)
    if who == "transformers":
        process = package.CLIPImageProcessor()
        return lambda file: process(Image.open(io.BytesIO(file)), return_tensors="np")["pixel_values"][0]
    module = package.clip if who == "OpenAI" else package.transform
    transform = module._transform(224) if who == "OpenAI" else module.image_transform(224, is_train=False)
    return lambda file: transform(Image.open(io.BytesIO(file))).numpy()
