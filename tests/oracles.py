"""The PyTorch references that parity is measured against: each function returns one, or skips the test that asks.

They are heavy, and torchvision has no CPU build, so they are installed apart (with `--no-deps`) and imported nowhere
else: where one is absent its tests skip, and say which.
"""

import importlib
import importlib.util
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def openai_clip() -> ModuleType:
    """Returns OpenAI's `clip` package, as clip-anytorch packs it (it needs setuptools<81 for `pkg_resources`)."""
    declare_torchvision_operators()
    return require("clip", package="clip-anytorch")


@lru_cache(maxsize=1)
def openai_tokenizer() -> Any:
    """Returns OpenAI's `SimpleTokenizer`, loaded by its path: the package around it would import torch."""
    path = package_folder("clip", package="clip-anytorch") / "simple_tokenizer.py"
    spec = importlib.util.spec_from_file_location("openai_simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def open_clip() -> ModuleType:
    """Returns OpenCLIP."""
    declare_torchvision_operators()
    require("timm")
    return require("open_clip", package="open_clip_torch")


def torchvision() -> ModuleType:
    """Returns torchvision, for its transforms of PIL's images."""
    declare_torchvision_operators()
    require("torchvision.transforms", package="torchvision")
    return require("torchvision")


def transformers() -> ModuleType:
    """Returns Hugging Face's models."""
    declare_torchvision_operators()
    return require("transformers")


def timm() -> ModuleType:
    """Returns timm, whose towers OpenCLIP's SigLIP has."""
    declare_torchvision_operators()
    return require("timm")


def clip_benchmark() -> ModuleType:
    """Returns CLIP_benchmark's command line, and with it all of its package."""
    declare_torchvision_operators()
    open_clip()
    return require("clip_benchmark.cli", package="clip_benchmark")


@lru_cache(maxsize=1)  # holds what it returns: a library takes its operators with it when it is collected
def declare_torchvision_operators() -> Any:
    """Returns the library of the operators that torchvision's Python wants declared, None where its C++ part loads.

    To be called before torchvision is imported: on a machine without CUDA the C++ part that declares them cannot load.
    """
    torch = require("torch")
    try:
        torch.ops.load_library(str(package_folder("torchvision") / "_C.so"))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def require(module: str, package: str | None = None) -> ModuleType:
    """Returns the imported module, or skips the test, naming the package and what its import said."""
    try:
        with warnings.catch_warnings():  # the references' deprecations are not ours to mend
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{package or module} does not import: {error}")


def package_folder(module: str, package: str | None = None) -> Path:
    """Returns the folder of an installed package without importing it, or skips the test, naming the package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package or module} is not installed")
    return Path(spec.origin).parent
