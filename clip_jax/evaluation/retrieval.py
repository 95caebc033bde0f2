"""Text-to-image and image-to-text retrieval: how often a right partner is among the K nearest."""

import numpy as np

from clip_jax.typing import Bool, Float, Int

RECALLS_AT = (1, 5, 10)
METRICS = tuple(f"{which}_retrieval_recall@{k}" for which in ("image", "text") for k in RECALLS_AT)
BLOCK = 1024  # queries scored at a time: never the whole matrix


def image_ranks(
    txt_AE: Float[np.ndarray, "A E"], img_BE: Float[np.ndarray, "B E"], image_of_text: Int[np.ndarray, " A"]
) -> Int[np.ndarray, " A"]:
    """Returns, for every text, how many images come before its own (0: its own is the nearest)."""
    ranks = []
    for start in range(0, len(txt_AE), BLOCK):
        own = image_of_text[start : start + BLOCK, None] == np.arange(len(img_BE))
        ranks.append(_rank_of_best(txt_AE[start : start + BLOCK] @ img_BE.T, own))
    return np.concatenate(ranks)


def text_ranks(
    txt_AE: Float[np.ndarray, "A E"], img_BE: Float[np.ndarray, "B E"], image_of_text: Int[np.ndarray, " A"]
) -> Int[np.ndarray, " B"]:
    """Returns, for every image, how many texts come before the nearest of its own."""
    ranks = []
    for start in range(0, len(img_BE), BLOCK):
        scores = img_BE[start : start + BLOCK] @ txt_AE.T
        ranks.append(_rank_of_best(scores, np.arange(start, start + len(scores))[:, None] == image_of_text))
    return np.concatenate(ranks)


def _rank_of_best(scores: Float[np.ndarray, "Q M"], own: Bool[np.ndarray, "Q M"]) -> Int[np.ndarray, " Q"]:
    """Returns how many come before the best of each row's own; among equals the earlier comes first.

    Equals must count: a collapsed model, to which all are equal, would otherwise find everything.
    """
    own_scores = np.where(own, scores, -np.inf)
    best, place = own_scores.max(axis=1, keepdims=True), own_scores.argmax(axis=1)[:, None]
    earlier = np.arange(scores.shape[1]) < place
    return ((scores > best) | ((scores == best) & earlier)).sum(axis=1)


def metrics(ranks_of_images: Int[np.ndarray, " A"], ranks_of_texts: Int[np.ndarray, " B"]) -> dict[str, float]:
    """Returns image_retrieval_recall@K and text_retrieval_recall@K, as CLIP_benchmark names them."""
    image = {f"image_retrieval_recall@{k}": float((ranks_of_images < k).mean()) for k in RECALLS_AT}
    text = {f"text_retrieval_recall@{k}": float((ranks_of_texts < k).mean()) for k in RECALLS_AT}
    return image | text
