"""Evaluation beside its peers, in one run, in turns: medians of several, as ratios.

The zero-shot classifier of 1,000 classes × 8 templates beside OpenCLIP's own builder, on ViT-B/32's text tower, half as
wide; retrieval's ranks of 50,000 texts × 50,000 images, 512 wide, beside faiss' flat index
(`pip install faiss-cpu`); and the memory of an evaluation of 200,000 images.

    python benchmarks/evaluation.py [--rounds=3] [--only=classifier|ranks|memory]
"""

import argparse
import dataclasses
import io
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import peers
import rich.console
import rich.table
from peers import OURS
from PIL import Image
from side_by_side import in_turns

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from in_memory import InMemory

from clip_jax import sharding
from clip_jax.config import MeshConfig
from clip_jax.data.sources import Record
from clip_jax.evaluation import retrieval, zero_shot
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.tasks import TASKS
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.weights import open_clip
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import flatten

CLASSES, WIDTH = 1000, 256  # of the text tower, which is 512 wide in ViT-B/32
TEMPLATES = (
    *("a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of the {}.", "a drawing of a {}."),
    *("a photo of many {}.", "itap of a {}.", "a {} in a video game.", "art of the {}."),
)
WORDS = ("great", "white", "shark", "electric", "tiger", "house", "finch", "coffee", "mug", "african", "grey", "bald")
PAIRS, EMBED_DIM = 50_000, 512
EVALUATED = 200_000


def narrowed() -> Bundle:
    """Returns ViT-B/32 with random weights, a narrow text tower and hardly an image tower."""
    named = VARIANTS["ViT-B/32"]
    text = dataclasses.replace(named.text, width=WIDTH, num_heads=WIDTH // 64, mlp_dim=4 * WIDTH)
    image = dataclasses.replace(named.image, width=64, num_heads=1, mlp_dim=256, depth=1)
    arch = dataclasses.replace(named, text=text, image=image)
    return Bundle(arch, flatten(jax.jit(Definition(arch).init)(jax.random.key(0))), "narrow", "random")


def classifier(rounds: int, folder: Path, classes: int = CLASSES) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Returns the seconds of both builders, whose classifiers are the same; and why there is no OpenCLIP's."""
    random, bundle = np.random.default_rng(0), narrowed()
    names = [" ".join(random.choice(WORDS, random.integers(1, 4))) + f" {i}" for i in range(classes)]
    found = {}

    def of(who: str) -> Callable[[], None]:
        build = (_our_builder if who == OURS else _their_builder)(bundle, names, folder)

        def job() -> None:
            found[who] = build()

        return job

    jobs, gaps = peers.available(of, (OURS, "OpenCLIP"))
    taken = in_turns(jobs, rounds)
    for who, built in found.items():
        difference = np.abs(found[OURS] - built).max()
        assert difference < 1e-5, f"{who}'s is not the same classifier: {difference}"
    return taken, gaps


def _our_builder(bundle: Bundle, names: list[str], folder: Path) -> Callable[[], np.ndarray]:
    ours = OnMesh.of(bundle, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    prompts = [[template.format(name) for template in TEMPLATES] for name in names]
    return lambda: zero_shot.classifier(ours, prompts)


def _their_builder(bundle: Bundle, names: list[str], folder: Path) -> Callable[[], np.ndarray]:
    """Raises peers.Gap: OpenCLIP is not installed."""
    package = peers.module("OpenCLIP")
    import torch
    from open_clip.zero_shot_classifier import build_zero_shot_classifier

    open_clip.write(folder, bundle)
    model, tokenizer = package.create_model(f"local-dir:{folder}").eval(), package.get_tokenizer("ViT-B-32")

    def build() -> np.ndarray:
        with torch.no_grad():
            return build_zero_shot_classifier(model, tokenizer, names, TEMPLATES).T.numpy()

    return build


def peak_of(job: Callable[[], object]) -> tuple[float, float]:
    """Returns (GB that this process has at most while it does the job, seconds)."""
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    job()
    taken = time.perf_counter() - start
    done.set()
    watcher.join()
    return most / 1e9, taken


def ranks(rounds: int) -> tuple[dict[str, list[float]], float]:
    """Returns the seconds of both, and the GB of our process, embeddings and all."""
    random = np.random.default_rng(0)
    img = random.normal(size=(PAIRS, EMBED_DIM)).astype(np.float32)
    txt = img + 4 * random.normal(size=img.shape).astype(np.float32)
    img, txt = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (img, txt))
    own, found = np.arange(PAIRS), {}

    def ours() -> None:
        found["ours"] = retrieval.metrics(retrieval.ranks(txt, img, own))

    def faiss_index() -> None:
        import faiss

        for name, queries, database in (("image", txt, img), ("text", img, txt)):
            index = faiss.IndexFlatIP(EMBED_DIM)
            index.add(database)
            _, nearest = index.search(queries, max(retrieval.RECALLS_AT))
            right = nearest == own[:, None]
            for k in retrieval.RECALLS_AT:
                found.setdefault("faiss", {})[f"{name}_retrieval_recall@{k}"] = float(right[:, :k].any(axis=1).mean())

    memory, _ = peak_of(ours)  # before faiss has any
    taken = in_turns({"ours": ours, "faiss": faiss_index}, rounds)
    for name, value in found["ours"].items():
        assert abs(value - found["faiss"][name]) <= 2 / PAIRS, (name, value, found["faiss"][name])
    return taken, memory


class Pictures(InMemory):
    """As many pictures as wanted, of a few files."""

    classnames = tuple(f"class {i}" for i in range(10))

    def __init__(self, length: int):
        self._length, self._files = length, []
        for i in range(16):
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
            self._files.append(file.getvalue())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return Record(self._files[index % 16], (), index % 10, str(index))


def memory() -> list[tuple[int, float, float]]:
    """Prints nothing, and returns (images evaluated, MB at that time) as an evaluation goes."""
    arch = VARIANTS["ViT-W64/4@16px"]
    bundle = Bundle(arch, flatten(jax.jit(Definition(arch).init)(jax.random.key(0))), "small", "random")
    model = OnMesh.of(bundle, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    rows, started = [], time.perf_counter()
    gathered, seen = model.gathered, 0

    def counting(x):
        nonlocal seen
        seen += 1
        if seen % 300 == 0:
            rows.append((seen, int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6))
        return gathered(x)

    model.gathered = counting
    TASKS["zeroshot_classification"].run(model, Pictures(EVALUATED), shows=False)
    calls = seen / EVALUATED
    return [(round(calls_then / calls), megabytes, time.perf_counter() - started) for calls_then, megabytes in rows]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("classifier", "ranks", "memory"))
    asked = parser.parse_args()
    if asked.only is None:  # a process each: what one has taken is not the other's
        for part in ("classifier", "ranks", "memory"):
            subprocess.run([sys.executable, __file__, f"--only={part}", f"--rounds={asked.rounds}"], check=True)
        return
    jax.config.update("jax_platforms", "cpu")
    console = rich.console.Console()
    if asked.only == "memory":
        rows = memory()
        early = next(row for row in rows if row[0] > EVALUATED // 10)
        console.print(
            f"evaluation of {EVALUATED:,} images: {early[1]:.0f} MB after {early[0]:,}, {rows[-1][1]:.0f} at the end, "
            f"{max(row[1] for row in rows):.0f} at most; {EVALUATED / rows[-1][2]:,.0f} images/s"
        )
        return
    if asked.only == "ranks":
        taken, gigabytes = ranks(asked.rounds)
        title = f"ranks of {PAIRS:,} × {PAIRS:,}, both ways, {EMBED_DIM} wide; our process {gigabytes:.2f} GB at most"
    else:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            taken, gaps = classifier(asked.rounds, Path(folder) / "model")
        for who, why in gaps.items():
            parser.error(f"{who}: {why}")
        title = f"classifier of {CLASSES:,} classes × {len(TEMPLATES)} templates, text tower {WIDTH} wide"
    table = rich.table.Table(title=title)
    for heading in ("", "median, s", "slowest / fastest"):
        table.add_column(heading)
    for name, seconds in taken.items():
        table.add_row(name, f"{statistics.median(seconds):.2f}", f"{max(seconds) / min(seconds):.2f}")
    ours, theirs = (statistics.median(seconds) for seconds in taken.values())
    table.add_row("ours / theirs", f"{ours / theirs:.2f}", "")
    console.print(table)


if __name__ == "__main__":
    main()
