"""Stand-in until helper C's is merged."""

import dataclasses
from typing import Any

from clip_jax.architecture import Preprocess


def from_open_clip(preprocess_cfg: dict[str, Any]) -> Preprocess:
    """Returns what OpenCLIP's preprocess_cfg says."""
    was = Preprocess()
    return Preprocess(
        mean=tuple(preprocess_cfg.get("mean", was.mean)),
        std=tuple(preprocess_cfg.get("std", was.std)),
        resize=preprocess_cfg.get("resize_mode", was.resize),
        interpolation=preprocess_cfg.get("interpolation", was.interpolation),
        fill=preprocess_cfg.get("fill_color", was.fill),
    )


def to_open_clip(preprocess: Preprocess) -> dict[str, Any]:
    """Returns OpenCLIP's preprocess_cfg."""
    says = dataclasses.asdict(preprocess)
    return {
        "mean": list(says["mean"]),
        "std": list(says["std"]),
        "interpolation": says["interpolation"],
        "resize_mode": says["resize"],
        "fill_color": says["fill"],
    }
