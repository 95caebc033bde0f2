"""Text-to-image and image-to-text retrieval: how often a right partner is among the K nearest."""

import numpy as np

from clip_jax.typing import Float, Int

RECALLS_AT = (1, 5, 10)
BLOCK = 1024  # queries scored at a time: never the whole matrix


def image_ranks(
    txt_AE: Float[np.ndarray, "A E"], img_BE: Float[np.ndarray, "B E"], image_of_text: Int[np.ndarray, " A"]
) -> Int[np.ndarray, " A"]:
    """Returns, for every text, how many images are nearer than its own (0: its own is the nearest)."""
    ranks = []
    for start in range(0, len(txt_AE), BLOCK):
        own = image_of_text[start : start + BLOCK]
        scores = txt_AE[start : start + BLOCK] @ img_BE.T
        ranks.append((scores > scores[np.arange(len(own)), own][:, None]).sum(axis=1))
    return np.concatenate(ranks)


def text_ranks(
    txt_AE: Float[np.ndarray, "A E"], img_BE: Float[np.ndarray, "B E"], image_of_text: Int[np.ndarray, " A"]
) -> Int[np.ndarray, " B"]:
    """Returns, for every image, how many texts are nearer than the nearest of its own."""
    ranks = []
    for start in range(0, len(img_BE), BLOCK):
        scores = img_BE[start : start + BLOCK] @ txt_AE.T
        own = image_of_text[None, :] == np.arange(start, start + len(scores))[:, None]
        best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
        ranks.append((scores > best).sum(axis=1))
    return np.concatenate(ranks)


def metrics(ranks_of_images: Int[np.ndarray, " A"], ranks_of_texts: Int[np.ndarray, " B"]) -> dict[str, float]:
    """Returns image_retrieval_recall@K and text_retrieval_recall@K, as CLIP_benchmark names them."""
    image = {f"image_retrieval_recall@{k}": float((ranks_of_images < k).mean()) for k in RECALLS_AT}
    text = {f"text_retrieval_recall@{k}": float((ranks_of_texts < k).mean()) for k in RECALLS_AT}
    return image | text
