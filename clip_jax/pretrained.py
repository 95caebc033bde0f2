"""Weights from wherever they are to wherever they should go: names, files, folders, hubs, runs.

`load` and `convert_weights.py` go through here; what the formats are is in `clip_jax/weights`.
"""

import dataclasses
import os
import reprlib
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import rich.console

from clip_jax.architecture import ACTIVATIONS, Architecture
from clip_jax.config import Config, ModelConfig
from clip_jax.elsewhere import is_elsewhere
from clip_jax.errors import UserError, about, nearest
from clip_jax.files import AnyPath, place, read_json
from clip_jax.models.clip import Definition
from clip_jax.models.transformer import Compute
from clip_jax.models.variants import RESNETS, architecture, with_activation
from clip_jax.weights import adapters, bundle, hub, huggingface, open_clip, openai, parity
from clip_jax.weights.bundle import Bundle, differences
from clip_jax.weights.download import RELEASES, fetch
from clip_jax.weights.interpolate import interpolate
from clip_jax.weights.mapping import DType, flatten
from clip_jax.weights.resize import resize
from clip_jax.weights.tensors import read_file
from clip_jax.workdir import CHECKPOINTS, Workdir


class Asked(NamedTuple):
    """What the user wants of the weights that are read; None: as they are."""

    variant: str | None = None  # the architecture that they must have; the only one a lone state dict can say
    activation: str | None = None  # computed instead of theirs
    image_size: int | None = None  # to which position embeddings are resized
    context_length: int | None = None
    logit_bias: bool | None = None  # whether they must have one; where the variant says otherwise, this holds


class WiseFT(NamedTuple):
    """How far a model is from the one that it was fine-tuned from (arXiv 2109.01903): weights/interpolate.py."""

    zero_shot: str | os.PathLike
    alpha: float  # 0: all zero-shot, 1: all fine-tuned


AS_IT_IS = Asked()


def read(
    source: str | os.PathLike,
    asked: Asked = AS_IT_IS,
    *,
    dtype: DType | None = None,
    download_root: str | os.PathLike | None = None,
) -> Bundle:
    """Returns the architecture and the weights, on the host, of a released model's name, a file of OpenAI's, a state
    dict whose variant is told, a folder of OpenCLIP's, Hugging Face's or ours, "hf://org/repo[@revision]", or the
    workdir of a run (its latest checkpoint), which may be gs://BUCKET/FOLDER.

    Floats come in `dtype`, or where that is None in the dtype of the source.

    Raises:
        UserError: nothing of that name, a damaged one, or one that is not what was asked; all that differs.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"a model is a name or a path, not {reprlib.repr(source)} of type {type(source).__name__}")
    if source == "":
        raise UserError("the name of a model is empty; the folder one is in is '.'")
    sizes = {"image_size": asked.image_size, "context_length": asked.context_length}
    if wrong := [f"{name}={size!r}" for name, size in sizes.items() if size is not None and type(size) is not int]:
        raise UserError(f"{', '.join(wrong)} should be a whole number")
    if asked.activation is not None and asked.activation not in ACTIVATIONS:
        raise UserError(f"activation={asked.activation!r}{nearest(asked.activation, ACTIVATIONS)}")
    named = None if asked.variant is None else architecture(ModelConfig(asked.variant, logit_bias=asked.logit_bias))
    expected = None if named is None else _insisted(named, asked)
    found = _read(source, expected, asked, dtype, download_root)
    found = dataclasses.replace(found, architecture=_insisted(found.architecture, asked))
    _check(found, expected, asked)
    return resize(found, asked.image_size, asked.context_length)


def initial(config: Config) -> Bundle | None:
    """Returns the weights that a new run starts from, in float32, for its image size and context length; None: the run
    draws its own.

    Raises:
        UserError: they cannot be read, or are not what the config says of its model; all that differs.
    """
    if config.init_from is None:
        return None
    model = config.model
    asked = Asked(model.variant, None, model.image_size, model.context_length, model.logit_bias)
    with about(f"init_from={config.init_from!r}"):
        return read(config.init_from, asked, dtype=np.float32)


def convert(
    source: str | os.PathLike,
    target_format: str,
    target: Path,
    asked: Asked = AS_IT_IS,
    *,
    wise_ft: WiseFT | None = None,
    check: bool = False,
) -> bool:
    """Writes the weights of `source` in another format, or those between them and the model that they were fine-tuned
    from; returns whether all that was checked is within its bar.

    What is checked is what the target format's own project computes from what was written, against ours from the
    source; and where the target is ours, what we compute from it against a project that can hold the model.

    Raises:
        UserError: a source that cannot be read, a format that is unknown or cannot hold it, a target that cannot be
            written, or a check without PyTorch.
    """
    if target_format not in WRITERS:
        raise UserError(f"unknown format {target_format!r}{nearest(target_format, WRITERS)}")
    if is_elsewhere(target):
        raise UserError(f"{str(target)!r} is not on this machine: write to a folder here, and copy it there")
    target = _expanded(target)
    original = read(source, asked)
    if wise_ft is not None:
        original = interpolate(read(wise_ft.zero_shot, asked), original, wise_ft.alpha)
    peer = _peer(original, target_format) if check else None
    WRITERS[target_format](target, original)
    console = rich.console.Console()
    console.print(f"{original.variant}: {original.origin} → {target}", soft_wrap=True, highlight=False, markup=False)
    if peer is None:
        return True
    rows = _compared(original, target_format, target, peer)
    console.print(parity.table(rows, title=f"{original.variant}: {target} against {parity.PEERS[peer].title}"))
    return all(row.holds for row in rows)


def can_hold(format_: str, architecture: Architecture) -> bool:
    """Returns whether another project's format can hold a model."""
    try:
        HOLDS[format_](architecture)
    except UserError:
        return False
    return True


def _compared(original: Bundle, target_format: str, target: Path, peer: str) -> list[parity.Row]:
    """Returns how far our numbers are from a peer's, where one side has what was written and the other the source."""
    if peer == target_format:
        return parity.compare(original, parity.reference(peer, target, original.architecture))
    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder) / "model"
        WRITERS[peer](theirs, original)
        return parity.compare(read(target), parity.reference(peer, theirs, original.architecture))


def _peer(original: Bundle, target_format: str) -> str:
    """Returns the format of the project that a model is checked against; its packages are there.

    Raises:
        UserError: no project can hold the model, or its packages are missing.
    """
    if target_format in parity.PEERS:
        holds = [target_format]
    else:
        holds = [name for name in HOLDS if can_hold(name, original.architecture)]
    if not holds:
        raise UserError(f"no other project has a model such as {original.variant}: leave --check away")
    parity.PEERS[holds[0]].load_packages()
    return holds[0]


def _read(
    source: str | os.PathLike,
    expected: Architecture | None,
    asked: Asked,
    dtype: DType | None,
    download_root: str | os.PathLike | None,
) -> Bundle:
    """Returns what the source holds; only a lone state dict is read as what is expected."""
    if source in RELEASES:
        file = fetch(RELEASES[source], None if download_root is None else Path(download_root))
        return dataclasses.replace(openai.read(file, dtype), variant=str(source), origin=f"openai: {file}")
    if str(source).startswith(hub.PREFIX):
        folder = hub.fetch(str(source))
        found = _read_folder(folder, asked, dtype)
        repository = str(source).removeprefix(hub.PREFIX)
        variant = repository if found.variant == folder.name else found.variant  # the folder's name is a commit's
        return dataclasses.replace(found, variant=variant, origin=str(source))
    path = place(source) if is_elsewhere(source) else _expanded(source)
    if _is_checkpoint(path):
        return _read_run(path.parent.parent, dtype, step=int(path.name))
    if is_elsewhere(source):
        return _read_run(path, dtype)
    if os.path.isfile(path):  # noqa: PTH113 (Path's own fails for a name that is too long)
        return _read_file(path, expected, asked, dtype)
    if os.path.isdir(path):  # noqa: PTH112
        return _read_folder(path, asked, dtype)
    raise UserError(
        f"{str(source)!r} is no file, no folder, no hf://org/repo, and none of the models that can be downloaded: "
        f"{', '.join(RELEASES)}"
    )


def _is_checkpoint(path: AnyPath) -> bool:
    """Returns whether a path is WORKDIR/checkpoints/STEP, and no model's folder that happens to be called so."""
    named = path.parent.name == CHECKPOINTS and path.name.isdecimal()
    return named and Workdir(path.parent.parent).is_claimed() and not (path / bundle.CONFIG).exists()


def _read_file(path: Path, expected: Architecture | None, asked: Asked, dtype: DType | None) -> Bundle:
    """Returns the model of a file of OpenAI's, which says what it is, or of a state dict as what is expected."""
    tensors = read_file(path)
    if openai.is_certain(path, tensors):
        return openai.bundle_of(tensors, path, dtype)
    if any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        raise UserError(f"{path} has Hugging Face's names; give the folder that it is in, with its config.json")
    if expected is None or asked.variant in RESNETS:
        resnet = f"; {asked.variant!r} is OpenAI's, OpenCLIP's are {asked.variant}-quickgelu and {asked.variant}-gelu"
        raise UserError(
            f"{path}: a state dict (of {', '.join(sorted(tensors)[:3])}, …) does not say how it was trained: OpenAI's "
            "models compute QuickGELU, OpenCLIP's most often GELU, and the wrong one costs accuracy without an error; "
            f"give its variant, such as 'ViT-B/32' (OpenAI's) or 'ViT-B-32' (OpenCLIP's){resnet if expected else ''}"
        )
    return open_clip.read_state_dict(path, expected, dtype)


def _read_folder(path: Path, asked: Asked, dtype: DType | None) -> Bundle:
    """Returns the model of a folder: OpenCLIP's by its own config, others by what their config.json has."""
    if open_clip.is_folder(path):
        return open_clip.read(path, dtype, activation=asked.activation)
    file = path / bundle.CONFIG
    if not os.path.lexists(file):
        raise UserError(
            f"{path} is not a run's folder, nor a model's: it has no {bundle.CONFIG} and no {open_clip.CONFIG}; "
            "choose another folder"
        )
    content = read_json(file)
    for field, reader in READERS.items():
        if isinstance(content, dict) and field in content:
            return reader(path, dtype)
    raise UserError(
        f"{file} should have 'format', as a model's folder of ours, 'model_type', as Hugging Face's, or 'config', as a "
        "run's; choose another folder"
    )


def _insisted(found: Architecture, asked: Asked) -> Architecture:
    """Returns the architecture with the activation that the user insists on."""
    return found if asked.activation is None else with_activation(found, asked.activation)


def _check(found: Bundle, expected: Architecture | None, asked: Asked) -> None:
    """Raises UserError, with all that differs, when the weights are not those of the variant that was asked for.

    Preprocessing and tokenizer come with the weights, and are theirs; a size that is asked for they will have.
    """
    if expected is None:  # then one thing alone can be wrong
        same = asked.logit_bias is None
        expected = found.architecture if same else dataclasses.replace(found.architecture, logit_bias=asked.logit_bias)
    sizes = {"image.image_size": asked.image_size, "text.context_length": asked.context_length}
    besides = ("preprocess.", "tokenize.", *(path for path, size in sizes.items() if size is not None))
    problems, advice = differences(expected, found.architecture, besides), ""
    if any("activation" in problem for problem in problems):
        advice += (
            ". Weights that were trained with QuickGELU and are computed with GELU, or the other way round, lose "
            "points of accuracy, and nothing says so; if the weights' own word is wrong, insist by activation= "
            "(train.py: convert them first, with convert_weights.py --activation)"
        )
    if any(problem.startswith(tuple(sizes)) for problem in problems):
        advice += (
            ". Position embeddings are resized for an image_size= or context_length= that is asked for (train.py: "
            "--config.model.image_size, --config.model.context_length)"
        )
    if problems:
        raise UserError(f"{found.origin} is no {asked.variant or 'such model'}: {'; '.join(problems)}{advice}")


def _expanded(path: str | os.PathLike) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path's own fails for a user that there is not)


def _read_run(path: AnyPath, dtype: DType | None, *, step: int | None = None) -> Bundle:
    """Returns what a checkpoint of a run holds, the latest unless told otherwise, adapters merged; `dtype` is float32,
    which a run's weights are."""
    from clip_jax.training.checkpoint import Checkpoints

    workdir = Workdir(path)
    architecture, lora = workdir.architecture(), workdir.lora()
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = Definition(architecture, Compute(lora=lora)).shapes()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    with Checkpoints(workdir.checkpoints) as checkpoints:
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise UserError(f"{workdir.path} has no checkpoint yet; train it first")
        weights = checkpoints.restore_weights(step, abstract)
    arrays = {path: np.asarray(x) for path, x in flatten(weights).items()}
    arrays = arrays if lora is None else adapters.merged(arrays, lora)
    origin = f"{workdir.path}/checkpoints/{step}"
    results = workdir.evaluation(step)
    kernel = bundle.check_resize_kernel(workdir.config_file, workdir.resize_kernel() or bundle.RESIZE_KERNELS[0])
    return Bundle(architecture, arrays, workdir.variant(), origin, workdir.tokenizer(), results, kernel)


READERS = {"format": bundle.read_folder, "model_type": huggingface.read, "config": _read_run}  # by config.json's fields
WRITERS = {
    "openai": openai.write,
    "open_clip": open_clip.write,
    "huggingface": huggingface.write,
    "clip_jax": bundle.write_folder,
}
HOLDS = {"openai": openai.check_held, "open_clip": open_clip.config_of, "huggingface": huggingface.config_of}
