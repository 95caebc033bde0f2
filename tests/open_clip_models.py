"""OpenCLIP's models with random weights: built by its own code from its own configs, narrowed or with few blocks."""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from oracles import open_clip, require

from clip_jax.architecture import Architecture


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keeps PyTorch from a second thread, which would wait, at full load, for the first after each of many products."""
    torch = require("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Outputs(NamedTuple):
    """What a model makes of images and captions."""

    img_BE: np.ndarray
    txt_AE: np.ndarray
    logits_BA: np.ndarray  # per image


def config_of(name: str) -> dict[str, Any]:
    """Returns the config of a model of OpenCLIP's."""
    return open_clip().get_model_config(name)


def narrowed(name: str) -> dict[str, Any]:
    """Returns a config with two heads a tower, two blocks, few words and patches; all else makes the model itself.

    timm's towers have the width that their name stands for.
    """
    config = config_of(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        pass
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [2, 1, 1, 1], "width": 16, "image_size": 96}
    else:
        patch_size = vision["patch_size"]
        vision |= {
            "layers": 2,
            "width": 2 * vision.get("head_width", 64),
            "image_size": 3 * patch_size + patch_size // 2,
        }
    if "timm_model_name" not in vision:
        config["embed_dim"] = 48
    text |= {"layers": 2, "width": 128, "heads": 2, "vocab_size": 500}
    return config


def few_blocks(name: str, depth: int) -> dict[str, Any]:
    """Returns a config of all widths with few blocks, and no more words than OpenAI's; timm's towers lose their blocks
    when the model is built."""
    config = config_of(name)
    config["text_cfg"]["vocab_size"] = min(config["text_cfg"]["vocab_size"], 49408)
    for tower in (config["vision_cfg"], config["text_cfg"]):
        if isinstance(tower.get("layers"), int):
            tower["layers"] = depth
    return config


@one_thread()
def random_model(config: dict[str, Any], *, timm_depth: int | None = None, noise: np.ndarray | None = None) -> Any:
    """Returns a model for evaluation, no gain, bias or temperature of which is left as it starts.

    `timm_depth`: how many blocks a tower of timm's keeps; the others are dropped before there are weights, so that none
    are drawn. `noise`: images that batch norm is to have seen (tests/models/test_openai_parity.py says why).
    """
    torch, peer = require("torch"), open_clip()
    config = copy.deepcopy(config)
    kind = peer.model.CustomTextCLIP if config.pop("custom_text", False) else peer.model.CLIP
    torch.manual_seed(0)
    if timm_depth is None:
        model = kind(**config)
    else:
        with torch.device("meta"):
            model = kind(**config)
        del model.visual.trunk.blocks[timm_depth:]
        assert not dict(model.named_buffers())  # they would be lost
        model = draw(model.to_empty(device="cpu"))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn(parameter.shape)
        for norm in norms:
            norm.momentum = 1.0  # what it has seen is what it sees now
        if norms:
            model.train().encode_image(as_images(noise))
    return model.eval()


def draw(model: Any) -> Any:
    """Returns the model with weights where there was memory: gains of 1, biases of 0, matrices that keep a size."""
    torch = require("torch")
    gains = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.LayerNorm)}
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim == 4 else parameter.shape[-1:].numel()
            if parameter.ndim < 2:
                parameter.fill_(id(parameter) in gains)
            else:
                parameter.normal_(std=fan_in**-0.5)
    return model


def inputs(architecture: Architecture, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of noise and 16 captions of several lengths: each ends with the id that it may be pooled at.

    With fewer captions the logits of a random model would be rounding (tests/models/test_openai_parity.py).
    """
    random = np.random.default_rng(0)
    size, text = architecture.image.image_size, architecture.text
    image_BHWC = random.normal(size=(images, size, size, 3)).astype(np.float32)
    tokens_AL = np.zeros((16, text.context_length), np.int32)
    last = text.vocab_size - 1 if text.eos_id is None else text.eos_id
    for row, length in zip(tokens_AL, np.linspace(2, text.context_length, len(tokens_AL)).astype(int), strict=True):
        row[:length] = [*random.integers(3, text.vocab_size - 1, length - 1), last]
        row[length + 1 :] = last  # what is pooled is the first
    return image_BHWC, tokens_AL


def as_images(image_BHWC: np.ndarray) -> Any:
    """Returns images as PyTorch has them."""
    return require("torch").from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy())


@one_thread()
def run(model: Any, image_BHWC: np.ndarray, tokens_AL: np.ndarray) -> Outputs:
    """Returns what the model computes."""
    torch = require("torch")
    image_BCHW, tokens_AL = as_images(image_BHWC), torch.from_numpy(tokens_AL)
    with torch.no_grad():
        outputs = (
            model.encode_image(image_BCHW),
            model.encode_text(tokens_AL),
            model.get_logits(image_BCHW, tokens_AL)[0],
        )
    return Outputs(*(x.numpy() for x in outputs))
