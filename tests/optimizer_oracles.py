"""The optimisers in NumPy, for one vector or one matrix at a time, in float64; and what of ours those are.

They know nothing of stacks: a stacked parameter is cut into the tensors that PyTorch's CLIP would have, each goes its
own way, and the results are put together again.
"""

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from clip_jax.architecture import Architecture, TextTower, ViTTower
from clip_jax.config import OptimConfig
from clip_jax.models.clip import Definition
from clip_jax.optim import flatten

Array = np.ndarray
ARCHITECTURE = Architecture(
    embed_dim=16,
    image=ViTTower(16, 4, width=32, depth=3, num_heads=4, mlp_dim=64),
    text=TextTower(8, 50, width=40, depth=3, num_heads=4, mlp_dim=48),
)
SHAPES = Definition(ARCHITECTURE).shapes().params
STEPS = 5


def random_params(seed: int) -> dict[str, Array]:
    """Returns arrays by path; with other seeds they are gradients."""
    random = np.random.default_rng(seed)
    return {path: random.normal(size=x.shape) for path, x in flatten(SHAPES).items()}


def cut(path: str, x: Array) -> list[tuple[int | None, Array]]:
    """Returns (block, tensor) for all that PyTorch has for one of our arrays, views of it: vectors and matrices.

    A block of None: it is in no stack. Queries, keys and values are matrices of their own.
    """
    found = []
    for i, block in enumerate(x) if "/blocks/" in path else [(None, x)]:
        if path.endswith("qkv/kernel"):  # [D 3 N K]
            found += [(i, block[:, t].reshape(len(block), -1)) for t in range(3)]
        elif path.endswith("out/kernel") or path.endswith("patch_embed/kernel"):  # [N K D]
            found.append((i, block.reshape(-1, block.shape[-1])))
        elif path.endswith("bias"):
            found.append((i, block.reshape(-1)))
        else:
            found.append((i, block))
    return found


def put_together(path: str, tensors: list[Array], shape: tuple[int, ...]) -> Array:
    """Undoes `cut`."""
    if path.endswith("qkv/kernel"):
        depth, width, _, heads, k = shape
        return np.stack(tensors).reshape(depth, 3, width, heads, k).swapaxes(1, 2)
    return np.stack(tensors).reshape(shape)


def adam(gradients: list[Array], config: OptimConfig) -> Iterator[Array]:
    """arXiv 1711.05101, algorithm 2, without the rate."""
    first = second = 0
    for t, g in enumerate(gradients, start=1):
        first = config.b1 * first + (1 - config.b1) * g
        second = config.b2 * second + (1 - config.b2) * g**2
        yield first / (1 - config.b1**t) / (np.sqrt(second / (1 - config.b2**t)) + config.eps)


def lion(gradients: list[Array], config: OptimConfig) -> Iterator[Array]:
    """arXiv 2302.06675, program 1."""
    momentum = 0 * gradients[0]
    for g in gradients:
        yield np.sign(config.b1 * momentum + (1 - config.b1) * g)
        momentum = config.b2 * momentum + (1 - config.b2) * g


def adafactor(gradients: list[Array], config: OptimConfig) -> Iterator[Array]:
    """arXiv 1804.04235, algorithm 4, without relative steps and clipping; the momentum of big_vision."""
    second = rows = columns = momentum = 0
    for t, g in enumerate(gradients, start=1):
        decay, square = min(config.b2, 1 - t**-0.8), g**2 + 1e-30
        if g.ndim == 2 and min(g.shape) >= 32:
            rows = decay * rows + (1 - decay) * square.mean(1)
            columns = decay * columns + (1 - decay) * square.mean(0)
            second = np.outer(rows, columns) / rows.mean()
        else:
            second = decay * second + (1 - decay) * square
        update = config.b1 * momentum + (1 - config.b1) * g / np.sqrt(second)
        momentum = update.astype(ml_dtypes.bfloat16).astype(np.float64)
        yield update


def muon(gradients: list[Array], config: OptimConfig) -> Iterator[Array]:
    """Keller Jordan's, with the momentum of Optax (Nesterov's, unbiased) and the size of arXiv 2502.16982, (4)."""
    momentum = 0
    for t, g in enumerate(gradients, start=1):
        momentum = config.b1 * momentum + (1 - config.b1) * g
        ahead = config.b1 * momentum / (1 - config.b1 ** (t + 1)) + (1 - config.b1) * g / (1 - config.b1**t)
        yield 0.2 * np.sqrt(max(g.shape)) * newton_schulz(ahead)


def newton_schulz(x: Array) -> Array:
    """Returns a matrix whose singular values have come near to 1."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / (np.sqrt((x**2).sum()) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


ORACLES = {"adamw": adam, "lion": lion, "adafactor": adafactor, "muon": muon}


def is_hidden(path: str, tensor: Array) -> bool:
    """Returns whether Muon takes a tensor for itself: a matrix within a block."""
    return "/blocks/" in path and tensor.ndim == 2


def trained(
    config: OptimConfig, rates: list[float], factor: Callable[[str, int | None], float], *, params: dict[str, Array]
) -> dict[str, Array]:
    """Returns parameters after a step at each of the rates, with the gradients `random_params(1)`, `(2)` and so on.

    `factor` gives that of the rate by path and block; 0: fixed. All that is of two dimensions decays, as in OpenCLIP.
    """
    gradients = [clipped(random_params(t + 1), config, factor) for t in range(len(rates))]
    after = {}
    for path, x in params.items():
        tensors = []
        for piece, (block, p) in enumerate(cut(path, x)):
            word = "adamw" if config.optimizer == "muon" and not is_hidden(path, p) else config.optimizer
            directions = ORACLES[word]([cut(path, g[path])[piece][1] for g in gradients], config)
            decay = config.weight_decay if p.ndim == 2 else 0.0
            for rate, direction in zip(rates, directions, strict=True):
                if factor(path, block):
                    p = p - rate * factor(path, block) * (direction + decay * p)
            tensors.append(p)
        after[path] = put_together(path, tensors, x.shape)
    return after


def clipped(gradients: dict[str, Array], config: OptimConfig, factor: Callable) -> dict[str, Array]:
    """Returns gradients limited in the norm of what is trained."""
    if config.clip_norm is None:
        return gradients
    norm2 = sum((g**2).sum() for path, x in gradients.items() for block, g in cut(path, x) if factor(path, block))
    return {path: x * min(1, config.clip_norm / np.sqrt(norm2)) for path, x in gradients.items()}
