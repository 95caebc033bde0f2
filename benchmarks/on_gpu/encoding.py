"""Images to features, beside OpenCLIP's and transformers' models."""

from collections.abc import Mapping

import numpy as np
from on_gpu.job import COMPILED, OURS, PEER, TRANSFORMERS, Found
from on_gpu.lab import Lab, alternating, gaps_of, median, prepare, row_of

CUDNN = "clip_jax, cuDNN's attention"
BAR = 1.2  # times as fast as the fastest peer
ANGLE = 0.045  # that features of many products in bfloat16 differ by: 11 roundings of 8 bits


def measure(lab: Lab, variant: str) -> bool:
    """Keeps a row: a variant's images, by us, and by OpenCLIP and transformers."""
    prepare(lab, variant)
    how = {OURS: "xla", CUDNN: "cudnn", COMPILED: "auto", PEER: "auto", TRANSFORMERS: "auto"}
    what = {"variant": variant, "n": lab.size.images}
    jobs = {who: lab.job("features", who=who, attention=attention, **what) for who, attention in how.items()}
    turns = alternating(lab, jobs)
    gaps = gaps_of(turns) | unlike(turns[0])
    row = row_of(
        f"encode_image of {variant}, {lab.size.images} at once, bfloat16",
        turns,
        lambda _, found: 1000 * median(found),
        unit="ms",
        bar=BAR,
        baselines=(CUDNN,),
        gaps=gaps,
    )
    of_first = {
        who: {name: turns[0][who].get(name) for name in ("compile_seconds", "peak_gb")}
        for who in jobs
        if who not in gaps
    }
    lab.report.keep("encoding", **{variant: {"row": row and row.as_json(), "sides": of_first, "gaps": gaps}})
    if row is None:
        lab.console.print(f"encoding of {variant}: {gaps[OURS]}", style="red")
        return False
    lab.show("encoding", [row])
    return True


def unlike(found: Mapping[str, Found]) -> dict[str, str]:
    """Returns who has other features than we have."""
    features = {who: np.asarray(one["features"]) for who, one in found.items() if "gap" not in one}
    features = {who: of_who / np.linalg.norm(of_who, axis=1, keepdims=True) for who, of_who in features.items()}
    cosines = {
        who: float((of_who * features[OURS]).sum(1).min()) for who, of_who in features.items() if OURS in features
    }
    return {
        who: f"not the same job: cosine {cosine:.5f}" for who, cosine in cosines.items() if cosine < 1 - ANGLE**2 / 2
    }
