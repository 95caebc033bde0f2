"""Random models of Hugging Face's own code, and folders of them, for whoever tests against it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from oracles import require, transformers

from clip_jax.architecture import Architecture, Preprocess, TextTower, Tokenize, ViTTower
from clip_jax.weights import tokenizer_files
from clip_jax.weights.bundle import Bundle
from clip_jax.weights.huggingface_config import config_of
from clip_jax.weights.preprocess_files import to_huggingface

HUGGINGFACE_PREPROCESS = Preprocess(rgb_first=True, crop_floor=True)
SIGLIP_PREPROCESS = dataclasses.replace(HUGGINGFACE_PREPROCESS, mean=(0.5,) * 3, std=(0.5,) * 3, resize="squash")

# Nothing is as the defaults of either family have it, and no two sizes are the same.
CLIP = Architecture(
    40,
    ViTTower(34, 8, 48, 3, 4, 104, "gelu", 1e-4),  # 2 pixels are not seen
    TextTower(20, 300, 36, 2, 3, 88, "gelu_tanh", 1e-6, pool="eos", eos_id=150),
    HUGGINGFACE_PREPROCESS,
    Tokenize("file", clean="none", pad_id=1),
)
OPENAI_LIKE = Architecture(
    64, ViTTower(32, 8, 128, 2, 2, 512), TextTower(16, 49408, 64, 2, 1, 256), HUGGINGFACE_PREPROCESS
)
SIGLIP = Architecture(
    56,
    ViTTower(
        *(30, 7, 56, 2, 7, 100, "gelu_tanh", 1e-6),
        **{"pool": "map", "class_token": False, "pre_norm": False, "patch_bias": True, "projection": False},
    ),
    TextTower(12, 200, 32, 3, 2, 72, "gelu", 1e-5, causal=False, pool="last", projection_bias=True),
    SIGLIP_PREPROCESS,
    Tokenize("file", clean="none", pad_id=1),
    logit_bias=True,
)


class Outputs(NamedTuple):
    """What a model makes of images and captions."""

    img_BE: np.ndarray
    txt_AE: np.ndarray
    logits_BA: np.ndarray  # per image


def config(architecture: Architecture) -> Any:
    """Returns their config object of an architecture."""
    package = transformers()
    content = config_of(architecture)
    return {"clip": package.CLIPConfig, "siglip": package.SiglipConfig}[content["model_type"]](**content)


def random_model(architecture: Architecture) -> Any:
    """Returns their model as they initialise it, except that no gain, bias or temperature is left as it starts."""
    torch, package = require("torch"), transformers()
    torch.manual_seed(0)
    model = {"clip": package.CLIPModel, "siglip": package.SiglipModel}[config(architecture).model_type](
        config(architecture)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn(parameter.shape)
        model.logit_scale.fill_(2.7)
    return model.eval()


def save(model: Any, architecture: Architecture, path: Path, **options: Any) -> Path:
    """Saves a model as they do, with the files of its preprocessing and its tokenizer; returns the folder."""
    model.save_pretrained(path, **options)
    size = architecture.image.image_size
    (path / "preprocessor_config.json").write_text(json.dumps(to_huggingface(architecture.preprocess, size)))
    for name, content in tokenizer_files.files(bundle_of(architecture), "huggingface").items():
        (path / name).write_bytes(content)
    return path


def bundle_of(architecture: Architecture) -> Bundle:
    """Returns a bundle without weights, with a tokenizer where the architecture has one of its own."""
    tokenizer = _tokenizer() if architecture.tokenize.kind == "file" else None
    return Bundle(architecture, {}, "a model", "nowhere", tokenizer)


def _tokenizer() -> str:
    """Returns the tokenizer.json of a tokenizer of a few words."""
    import tokenizers

    words = ["<unk>", "<pad>", "a", "photo", "of", "cat", "dog"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<pad>"])
    return tokenizer.to_str()


def inputs(architecture: Architecture, images: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of noise, and 16 captions of 2 tokens up to all; among them some are less than orthogonal.

    The token that ends a caption is in it once, but not always the largest.
    """
    random = np.random.default_rng(0)
    size, text = architecture.image.image_size, architecture.text
    end = text.vocab_size - 1 if text.eos_id is None else text.eos_id
    image_BHWC = random.normal(size=(images, size, size, 3)).astype(np.float32)
    tokens_AL = np.full((16, text.context_length), architecture.tokenize.pad_id, np.int32)
    words = [word for word in range(2, text.vocab_size) if word != end]
    for row, length in zip(tokens_AL, np.linspace(2, text.context_length, len(tokens_AL)).astype(int), strict=True):
        row[:length] = [*random.choice(words, length - 1), end]
    return image_BHWC, tokens_AL


def run(model: Any, image_BHWC: np.ndarray, tokens_AL: np.ndarray) -> Outputs:
    """Returns what their code computes."""
    torch = require("torch")
    pixels, tokens = torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy()), torch.from_numpy(tokens_AL).long()
    with torch.no_grad():
        image, text = model.get_image_features(pixels).pooler_output, model.get_text_features(tokens).pooler_output
        logits = model(pixel_values=pixels, input_ids=tokens).logits_per_image
    return Outputs(image.float().numpy(), text.float().numpy(), logits.float().numpy())
