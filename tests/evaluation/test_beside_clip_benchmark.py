"""CLIP_benchmark's own code on the PyTorch original, and ours, on the same tars: equal to the last example.

Its command line reads the tars, builds the classifier and counts; of its linear probe, which wants CUDA, the features.
Small models always; with `make test-full` ViT-B/32 in a file of OpenAI's, and Hugging Face's SigLIP, at full size.
"""

import ast
import contextlib
import dataclasses
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import huggingface_models
import jax
import numpy as np
import pytest
import shards
from open_clip_models import one_thread
from oracles import clip_benchmark, openai_clip, require, transformers
from PIL import Image

from clip_jax import pretrained, sharding
from clip_jax.architecture import Architecture
from clip_jax.config import MeshConfig
from clip_jax.data.sources import open_source
from clip_jax.evaluation import run
from clip_jax.evaluation.encode import Images
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.run import Evaluation
from clip_jax.evaluation.tasks import TASKS, Options
from clip_jax.models.clip import Definition
from clip_jax.models.variants import VARIANTS
from clip_jax.weights import open_clip, openai
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.mapping import flatten

CLASSES = ("cat", "dog", "photo of a cat", "photo of a dog", "cat dog", "dog dog cat")
TEMPLATES = ("a photo of a {c}", "{c} of a photo", "a {c}")
WORDS = ("a", "photo", "of", "cat", "dog")
BATCH = 32


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Lets warnings pass: their deprecations are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Peer(NamedTuple):
    """A PyTorch original in CLIP_benchmark's hands, and the same in ours."""

    load: Callable[..., tuple[Any, Any, Any]]  # as CLIP_benchmark's own `load_clip`: model, transform, tokenizer
    names: dict[str, str]  # its arguments `model` and `pretrained`
    ours: OnMesh


def on_mesh(path: Path, **asked: Any) -> OnMesh:
    bundle = pretrained.read(path, pretrained.Asked(**asked))
    return OnMesh.of(bundle, sharding.make_mesh(MeshConfig(), jax.devices()[:2]), batch_size=BATCH // 2)


def drawn(arch: Architecture, *, half: bool = False) -> Bundle:
    """Returns random weights, large enough that no two images are alike to the model; or in float16 what is in it in
    OpenAI's files."""
    arrays = flatten(jax.jit(Definition(arch).init)(jax.random.key(0)))
    random = np.random.default_rng(0)

    def moved(path: str, x: jax.Array) -> np.ndarray:
        in_half = path.endswith(("kernel", "projection")) or (path.endswith("bias") and "norm" not in path)
        found = np.asarray(x) + 0.02 * random.normal(size=x.shape)
        return found.astype(np.float16 if half and in_half else np.float32)

    return Bundle(arch, {path: moved(path, x) for path, x in arrays.items()}, "drawn", "drawn")


def openai_file(folder: Path) -> Peer:
    """Returns ViT-B/32 in a file of OpenAI's, read by OpenAI's own code."""
    openai.write(folder / "B-32.pt", drawn(VARIANTS["ViT-B/32"], half=True))
    clip = openai_clip()
    with hushed():
        model, transform = clip.load(str(folder / "B-32.pt"), device="cpu", jit=False)

    def tokenizer(texts: list[str]):
        return clip.tokenize(texts, truncate=True)

    names = {"model": "ViT-B/32", "pretrained": "openai"}
    return Peer(lambda **_: (model.float(), transform, tokenizer), names, on_mesh(folder / "B-32.pt"))


def open_clip_folder(folder: Path) -> Peer:
    """Returns a small model in a folder of OpenCLIP's."""
    arch = VARIANTS["ViT-W64/4@16px"]
    image = dataclasses.replace(arch.image, width=128, num_heads=2, image_size=32, patch_size=8)  # heads are 64 wide
    text = dataclasses.replace(arch.text, width=128, num_heads=2)
    open_clip.write(folder, drawn(dataclasses.replace(arch, image=image, text=text)))
    return Peer(clip_benchmark().load_clip, {"model": f"local-dir:{folder}", "pretrained": ""}, on_mesh(folder))


def siglip(folder: Path, arch: Architecture = huggingface_models.SIGLIP) -> Peer:
    """Returns Hugging Face's SigLIP, its own processor and tokenizer around it."""
    package, torch = transformers(), require("torch")
    theirs = huggingface_models.random_model(arch)
    huggingface_models.save(theirs, arch, folder)
    prepare = package.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    words = package.AutoTokenizer.from_pretrained(folder)

    class Model(torch.nn.Module):
        def encode_image(self, image):
            return theirs.get_image_features(image).pooler_output

        def encode_text(self, tokens):
            return theirs.get_text_features(tokens).pooler_output

    def transform(image: Image.Image):
        return prepare(image, return_tensors="pt")["pixel_values"][0]

    def tokenizer(texts: list[str]):
        length = arch.text.context_length
        return words(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]

    names = {"model": "siglip", "pretrained": "huggingface"}
    return Peer(lambda **_: (Model(), transform, tokenizer), names, on_mesh(folder))


def full_siglip(folder: Path) -> Peer:
    named, like = VARIANTS["ViT-B-16-SigLIP"], huggingface_models.SIGLIP
    image, text = (dataclasses.replace(tower, activation="gelu_tanh") for tower in (named.image, named.text))
    changes = {"image": image, "text": text, "preprocess": like.preprocess, "tokenize": like.tokenize}
    return siglip(folder, dataclasses.replace(named, **changes))


PEERS = {"OpenCLIP's folder": open_clip_folder, "Hugging Face's SigLIP": siglip}
FULL = {"OpenAI's ViT-B/32": openai_file, "Hugging Face's ViT-B-16-SigLIP": full_siglip}


@pytest.fixture(scope="module", params=[*PEERS, *(pytest.param(name, marks=pytest.mark.full) for name in FULL)])
def peer(request, tmp_path_factory) -> Peer:
    clip_benchmark()
    return (PEERS | FULL)[request.param](tmp_path_factory.mktemp("model"))


def picture(number: int, kind: str) -> bytes:
    random, file = np.random.default_rng(number), io.BytesIO()
    colour = np.random.default_rng([1, number % len(CLASSES)]).integers(0, 256, (3, 3, 3))
    pixels = np.kron(colour, np.ones((17, 15, 1))) + random.normal(0, 50, (51, 45, 3))
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def caption(number: int) -> str:
    """Returns a caption that no other number has."""
    return " ".join(WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(8))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Data sets in CLIP_benchmark's layout: "pictures" with classes, "captions" with one to five of them an image."""
    root = tmp_path_factory.mktemp("root")
    for split, first in (("train", 1000), ("test", 0)):
        for shard in range(3):
            numbers = range(first + 27 * shard, first + 27 * (shard + 1))
            kind = ("webp", "png", "jpg")[shard]
            image = {number: picture(number, {"jpg": "jpeg"}.get(kind, kind)) for number in numbers}
            classes = [(f"{n:05}", {kind: image[n], "cls": str(n % len(CLASSES)).encode()}) for n in numbers]
            texts = [
                (f"{n:05}", {kind: image[n], "txt": "\n".join(caption(5 * n + i) for i in range(1 + n % 5)).encode()})
                for n in numbers
            ]
            shards.write(root / "pictures" / split / f"{shard}.tar", classes)
            shards.write(root / "captions" / split / f"{shard}.tar", texts)
        for name in ("pictures", "captions"):
            (root / name / split / "nshards.txt").write_text("3")
    (root / "pictures" / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "pictures" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (root / "captions" / "dataset_type.txt").write_text("retrieval")
    return root


@one_thread()
def theirs(peer: Peer, root: Path, name: str, task: str, output: Path, monkeypatch) -> dict:
    """Returns what CLIP_benchmark's command writes."""
    cli = clip_benchmark()
    monkeypatch.setattr(cli, "load_clip", peer.load)
    # It makes numbers of arrays of one element, which NumPy does no longer since 2.4.
    monkeypatch.setattr(cli.zeroshot_classification, "float", lambda x: np.ravel(x)[0].item(), raising=False)
    asked = {"dataset": f"wds/{name}", "dataset_root": str(root / name), "task": task, "output": str(output)}
    asked |= {"split": "test", "recall_k": [1, 5, 10], "batch_size": BATCH, "num_workers": 0, "amp": False, "seed": 0}
    asked |= {"language": "en", "model_type": "open_clip", "model_cache_dir": None, "annotation_file": ""}
    asked |= {"custom_template_file": None, "custom_classname_file": None, "wds_cache_dir": None, "save_clf": None}
    asked |= {"load_clfs": [], "skip_load": False, "skip_existing": False, "distributed": False, "verbose": False}
    asked |= {"dump_classnames": True, "dump_templates": True}
    with hushed():
        cli.run(SimpleNamespace(**asked, **peer.names))
    return json.loads(output.read_text())


def counts(metrics: dict[str, float], of: dict[str, int]) -> dict[str, int]:
    """Returns how many examples a share is of: theirs are rounded to float32 on the way."""
    found = {name: value * of[name] for name, value in metrics.items()}
    assert all(abs(count - round(count)) < 1e-3 for count in found.values())
    return {name: round(count) for name, count in found.items()}


def test_classification_is_theirs_to_the_last_example(peer, root, tmp_path, monkeypatch):
    expected = theirs(peer, root, "pictures", "zeroshot_classification", tmp_path / "theirs.json", monkeypatch)
    source = open_source(f"wds:{root / 'pictures'}", default_split="test", needs=("image", "label"))
    asked = Evaluation("zeroshot_classification", source, Options(dump_classnames=True, dump_templates=True))
    run.evaluate(peer.ours, asked, tmp_path / "ours.json")
    found = json.loads((tmp_path / "ours.json").read_text())
    assert list(found) == list(expected)
    assert (found["classnames"], found["templates"]) == (expected["classnames"], expected["templates"])
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}
    assert list(found["metrics"]) == list(expected["metrics"])
    whole = ("acc1", "acc5")
    of = dict.fromkeys(whole, 81)
    assert counts({name: found["metrics"][name] for name in whole}, of) == counts(
        {name: expected["metrics"][name] for name in whole}, of
    )
    recall = "mean_per_class_recall"
    assert found["metrics"][recall] == pytest.approx(expected["metrics"][recall], abs=1e-12)
    assert 0.1 < found["metrics"]["acc5"] < 1, "neither all nor nothing"


def test_retrieval_is_theirs_to_the_last_example(peer, root, tmp_path, monkeypatch):
    expected = theirs(peer, root, "captions", "zeroshot_retrieval", tmp_path / "theirs.json", monkeypatch)
    source = open_source(f"wds:{root / 'captions'}", default_split="test", needs=("image", "captions"))
    run.evaluate(peer.ours, Evaluation("zeroshot_retrieval", source, Options()), tmp_path / "ours.json")
    found = json.loads((tmp_path / "ours.json").read_text())
    assert list(found) == list(expected)
    assert list(found["metrics"]) == list(expected["metrics"])
    texts = sum(len(source[i].captions) for i in range(len(source)))
    of = {name: texts if name.startswith("image") else len(source) for name in found["metrics"]}
    assert counts(found["metrics"], of) == counts(expected["metrics"], of)


def test_features_of_the_linear_probe_are_theirs(peer, root):
    cli, torch = clip_benchmark(), require("torch")
    model, transform, _ = peer.load(
        model_type="open_clip",
        model_name=peer.names["model"],
        pretrained=peer.names["pretrained"],
        cache_dir=None,
        device="cpu",
    )
    with hushed():
        dataset = cli.build_dataset("wds/pictures", str(root / "pictures"), transform, split="train")
    source = open_source(f"wds:{root / 'pictures'}/train", needs=("image", "label"))
    with one_thread(), torch.no_grad(), hushed():
        batches = list(dataset.batched(BATCH))
    for normalised, feature in ((True, "embedding"), (False, "projected")):
        featurizer = cli.linear_probe.Featurizer(model.eval(), normalised)
        with one_thread(), torch.no_grad():
            expected = np.concatenate([featurizer(images).numpy() for images, _ in batches])
        parts = list(Images(peer.ours, source, feature=feature))
        found = np.concatenate([peer.ours.gathered(part.features)[part.rows] for part in parts])
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        labels = [record.label for part in parts for record in part.records]
        assert labels == [int(label) for _, several in batches for label in several]


def test_the_linear_probe_says_what_theirs_does(peer, root):
    train, test = (
        open_source(f"wds:{root / 'pictures'}/{split}", needs=("image", "label")) for split in ("train", "test")
    )
    found = TASKS["linear_probe"].run(peer.ours, test, Options(train=train, feature="embedding"))
    code = ast.parse(Path(clip_benchmark().linear_probe.__file__).read_text())
    evaluate = next(node for node in code.body if isinstance(node, ast.FunctionDef) and node.name == "evaluate")
    returned = [node.value for node in ast.walk(evaluate) if isinstance(node, ast.Return)]
    [theirs] = [value for value in returned if isinstance(value, ast.Dict)]
    assert list(found.metrics) == [key.value for key in theirs.keys]
