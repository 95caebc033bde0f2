"""One model of random weights, as each project reads it from a file of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import OURS

from clip_jax.models.variants import VARIANTS
from clip_jax.weights.bundle import Bundle


def drawn(variant: str) -> Bundle:
    """Returns a model's weights as a training begins, each a number of float16's: OpenAI's code makes it one."""
    import jax

    from clip_jax.models.clip import Definition
    from clip_jax.weights.mapping import flatten

    arch = VARIANTS[variant]
    arrays = flatten(jax.device_get(jax.jit(Definition(arch).init)(jax.random.key(0))))
    arrays = {path: x.astype(np.float16).astype(x.dtype) for path, x in arrays.items()}
    return Bundle(arch, arrays, variant, "random")


def write_all(bundle: Bundle, folder: Path, names: Sequence[str] = ("OpenAI", "OpenCLIP", "transformers")) -> dict:
    """Returns where each project's file or folder lies, by its name; ours reads that of the first."""
    from clip_jax.weights import huggingface, open_clip, openai

    families = {"OpenAI": openai, "OpenCLIP": open_clip, "transformers": huggingface}
    paths = {who: folder / f"{who}.pt" if who == "OpenAI" else folder / who for who in names}
    for who, path in paths.items():
        families[who].write(path, bundle)
    return {OURS: paths[names[0]]} | paths


class Encoders(NamedTuple):
    """How a project makes features of normalised images [B H W C] and of tokens [B L], both NumPy arrays."""

    image: Callable[[np.ndarray], Callable[[], Any]]  # the inputs → the call that is timed
    text: Callable[[np.ndarray], Callable[[], Any]]


def encoders(who: str, model: Any) -> Encoders:
    """Returns a project's encoders; inputs are made ready before the call."""
    if who == OURS:
        return Encoders(
            lambda images: lambda: np.asarray(model.encode_image(images)),
            lambda tokens: lambda: np.asarray(model.encode_text(tokens)),
        )
    import torch

    def pixels(images: np.ndarray) -> "torch.Tensor":
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    def ids(tokens: np.ndarray) -> "torch.Tensor":
        return torch.from_numpy(tokens.astype(np.int64))

    def timed(call: Callable[[Any], Any]) -> Callable[[Any], Callable[[], Any]]:
        def prepared(inputs: Any) -> Callable[[], np.ndarray]:
            def run() -> np.ndarray:
                with torch.no_grad():
                    return features(call(inputs)).numpy()

            return run

        return prepared

    if who == "transformers":
        image = timed(lambda x: model.get_image_features(pixel_values=x))
        text = timed(lambda x: model.get_text_features(input_ids=x))
    else:
        image, text = timed(model.encode_image), timed(model.encode_text)
    return Encoders(lambda images: image(pixels(images)), lambda tokens: text(ids(tokens)))


def features(found: Any) -> Any:
    """Returns the tensor: transformers 5 gives it with more around it."""
    return getattr(found, "pooler_output", found)
