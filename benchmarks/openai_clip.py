"""clip_jax beside OpenAI's own code on the same machine: loading, encoding, tokenizing.

    make benchmark

Hardware: any CPU; needs PyTorch and OpenAI's code (as `make test` installs them).
Time: about four minutes on 2 cores.
Every figure is a ratio of medians: the two take turns in one run, and what is above 1 is in our favour.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rich.console
import rich.table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

CAPTIONS = ("a photo of a {}.", "the {} on the left, seen from above", "two {}s and a small dog near the old harbour")
WORDS = ("cat", "sailing boat", "teapot", "lighthouse", "bicycle", "violin", "pepper", "street", "cloud", "mountain")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ViT-B-32.pt"
        run("make_file", file)
        rows = [*run("loading", file), *run("encoding", file), *run("tokenizing", file)]
    table = rich.table.Table(title="ViT-B/32, float32, against OpenAI's code on this machine")
    for heading in ("", "clip_jax", "OpenAI", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, ours, theirs, unit in rows:
        table.add_row(name, f"{ours:.3g} {unit}", f"{theirs:.3g} {unit}", f"{theirs / ours:.2f}")
    rich.console.Console().print(table)


def run(task: str, file: Path) -> list:
    """Returns what a task prints as JSON, run in a process of its own so that none warms up another."""
    done = subprocess.run([sys.executable, __file__, task, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def make_file(file: Path) -> list:
    """Writes a traced float16 ViT-B/32 of random weights: the format of the released files."""
    clip, torch = original()
    torch.manual_seed(0)
    model = clip.model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12).eval()
    clip.model.convert_weights(model)
    inputs = torch.zeros(1, 3, 224, 224), torch.ones(1, 77, dtype=torch.int64)
    with torch.no_grad():
        torch.jit.trace(model, inputs, check_trace=False).save(file)
    return []


def loading(file: Path) -> list:
    """Returns the time of `load`, and the most memory its process ever had, imports included."""
    found = {task: [run(task, file) for _ in range(3)] for task in ("load_ours", "load_theirs")}
    ours, theirs = ([statistics.median(column) for column in zip(*runs, strict=True)] for runs in found.values())
    return [["load: time", ours[0], theirs[0], "s"], ["load: peak memory", ours[1], theirs[1], "MB"]]


def load_ours(file: Path) -> list[float]:
    import jax

    import clip_jax.api

    return measured(lambda: jax.block_until_ready(clip_jax.load(file)[0].placed))


def load_theirs(file: Path) -> list[float]:
    clip, _ = original()
    return measured(lambda: clip.load(str(file), device="cpu", jit=False))


def measured(load: Callable) -> list[float]:
    """Returns the seconds that a call takes and the megabytes that its process has had at most."""
    import resource

    start = time.perf_counter()
    load()
    return [time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]


def encoding(file: Path) -> list:
    """Returns the times of images and of captions, the same ones on both sides."""
    import clip_jax

    clip, torch = original()
    ours, _ = clip_jax.load(file)
    theirs, _ = clip.load(str(file), device="cpu", jit=False)
    rows = []
    for batch in (32, 1):
        images = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)
        tensors = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        pair = (lambda x=images: ours.encode_image(x)), (lambda x=tensors: theirs.encode_image(x))
        rows.append([f"encode_image, {batch} at once", *medians(*pair, torch), "s"])
    for longest in (77, 20):
        tokens = np.zeros((32, 77), np.int32)
        lengths = np.random.default_rng(1).integers(longest // 2, longest + 1, 32)
        lengths[0] = longest
        for row, length in zip(tokens, lengths, strict=True):
            row[:length] = [49406, *range(1000, 1000 + length - 2), 49407]
        tensors = torch.from_numpy(tokens.astype(np.int64))
        pair = (lambda x=tokens: ours.encode_text(x)), (lambda x=tensors: theirs.encode_text(x))
        rows.append([f"encode_text, 32 captions of at most {longest} tokens", *medians(*pair, torch), "s"])
    return rows


def medians(ours: Callable, theirs: Callable, torch) -> tuple[float, float]:
    """Returns the median times of two calls that take turns, after one of each to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        ours(), theirs()
        until = time.perf_counter() + 20
        while len(times[0]) < 7 or (time.perf_counter() < until and len(times[0]) < 50):
            for call, record in zip((ours, theirs), times, strict=True):
                start = time.perf_counter()
                call()
                record.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def tokenizing(_: Path) -> list:
    """Returns the times of 20,000 captions in one call, warm."""
    import clip_jax

    clip, torch = original()
    random = np.random.default_rng(0)
    texts = [str(random.choice(CAPTIONS)).format(" and ".join(random.choice(WORDS, 2))) for _ in range(20_000)]
    pair = (lambda: clip_jax.tokenize(texts)), (lambda: clip.tokenize(texts))
    return [["tokenize, 20,000 captions", *medians(*pair, torch), "s"]]


def original():
    """Returns OpenAI's package, and torch."""
    import oracles

    return oracles.openai_clip(), oracles.require("torch")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
