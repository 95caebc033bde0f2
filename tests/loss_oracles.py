"""The contrastive losses, their gradients and who found whom in NumPy float64, by hand; and embeddings to try them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

EPS = float(np.finfo(np.float32).eps)


class Truth(NamedTuple):
    """A loss and its gradients."""

    loss: float
    img: np.ndarray
    txt: np.ndarray
    scale: float
    bias: float | None
    scale_terms: float  # the sum of the absolute terms of `scale`: what its rounding error is relative to


def softmax(img, txt, scale: float, valid) -> Truth:
    """Returns the truth of a batch, from its valid pairs alone.

    With z_ij = l_ij − l_ii, row i costs log(1 + Σ_{j≠i} exp z_ij): exact also where the loss is nearly nothing.
    """
    img, txt, valid = np.float64(img), np.float64(txt), np.asarray(valid)
    a, b, n = img[valid], txt[valid], int(valid.sum())
    if n < 2:
        return Truth(0.0, 0 * img, 0 * txt, 0.0, None, 0.0)
    cosines = a @ b.T

    def rows(cosines):
        z = np.where(np.eye(n, dtype=bool), -np.inf, scale * (cosines - np.diag(cosines)[:, None]))
        top = z.max(1, keepdims=True)
        log_sum = top + np.log(np.exp(z - top).sum(1, keepdims=True))
        shares = np.exp(z - np.logaddexp(0, log_sum))
        return np.logaddexp(0, log_sum).mean(), (shares - np.diag(shares.sum(1))) / n

    (by_row, row_grads), (by_column, column_grads) = rows(cosines), rows(cosines.T)
    return _truth((by_row + by_column) / 2, (row_grads + column_grads.T) / 2, img, txt, scale, valid)


def sigmoid(img, txt, scale: float, bias: float, valid) -> Truth:
    """Returns the truth of a batch, from its valid pairs alone."""
    img, txt, valid = np.float64(img), np.float64(txt), np.asarray(valid)
    n = int(valid.sum())
    sign = 2 * np.eye(n) - 1
    logits = sign * (scale * img[valid] @ txt[valid].T + bias)
    grads = -sign * np.exp(-np.logaddexp(0, logits)) / max(n, 1)
    truth = _truth(np.logaddexp(0, -logits).sum() / max(n, 1), grads, img, txt, scale, valid)
    return truth._replace(bias=grads.sum())


def accuracies(img, txt, valid, eps: float = EPS) -> tuple[float, float]:
    """Returns the share of valid images that are nearest to their own text, and of texts to their image; equals, as far
    as a cosine is known, are not found."""
    img, txt, valid = np.float64(img), np.float64(txt), np.asarray(valid)
    cosines, n = img[valid] @ txt[valid].T, int(valid.sum())
    others = np.where(np.eye(n, dtype=bool), -np.inf, cosines)
    own = np.diag(cosines) - img.shape[1] ** 0.5 * eps
    return tuple(float((own > others.max(axis, initial=-np.inf)).sum()) / max(n, 1) for axis in (1, 0))


def _truth(loss: float, grads, img, txt, scale: float, valid) -> Truth:
    """Returns a truth from the gradients of the logits of valid pairs."""
    a, b = img[valid], txt[valid]
    img_grads, txt_grads = 0 * img, 0 * txt
    img_grads[valid], txt_grads[valid] = scale * grads @ b, scale * grads.T @ a
    terms = grads * (a @ b.T)
    return Truth(loss, img_grads, txt_grads, terms.sum(), None, np.abs(terms).sum())


def pairs(seed: int, size: int = 32, width: int = 64, *, noise: float | None = None, dtype=jnp.float32):
    """Returns unit rows: texts that have nothing to do with their images, or are them with some noise."""
    random = np.random.default_rng(seed)
    img, txt = random.normal(size=(2, size, width))
    if noise is not None:
        txt = img + noise * txt
    return unit(img, dtype), unit(txt, dtype)


def unit(x: np.ndarray, dtype=jnp.float32):
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype)


def embeddings(kind: str, size: int, width: int, dtype) -> tuple:
    """Returns embeddings as they are at some time of a training: at its start, its end, and where it went wrong."""
    random = np.random.default_rng(7)
    img, txt = random.normal(size=(2, size, width))
    common = random.normal(size=(1, width))
    return {
        "random": lambda: (unit(img, dtype), unit(txt, dtype)),
        "aligned": lambda: (unit(img, dtype), unit(img + 0.1 * txt, dtype)),
        "collapsed": lambda: (unit(common + 0.03 * img, dtype), unit(common + 0.03 * txt, dtype)),  # cosines of .999
        "identical": lambda: (unit(0 * img + common, dtype), unit(0 * txt + common, dtype)),
        "orthogonal": lambda: (unit(np.eye(size, width), dtype), unit(np.eye(size, width), dtype)),
    }[kind]()
