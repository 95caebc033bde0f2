"""How many FLOP a pair costs, what the architecture asks for whatever the compiler makes of it; and what a chip can do.

Two a multiply-add of every matrix product and convolution, attention scores included, masked ones too; norms,
activations and look-ups are not counted. Texts are as long as the architecture's context.

A tower is a chain of layers. Training asks for the forward pass of all; for a product's gradient of its weights where
they are trained; and for its gradient of what it reads where anything before it is trained. Each is as large a product.
So a tower that is trained whole costs three times its forward pass, but for the gradient of the pixels, and one that is
fixed costs one.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from clip_jax.architecture import Architecture, ImageTower, Lora, ResNetTower, TextTower, ViTTower

# Dense bfloat16 FLOP/s of a chip, by JAX's name for the device; from Google's pages, and NVIDIA's data sheets, whose
# figures with sparsity are twice these. The very names: a part of a GPU (MIG) has its GPU's name, and more behind it.
PEAKS = {
    "TPU v4": 275e12,
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), 197e12),
    **dict.fromkeys(("TPU v5", "TPU v5p"), 459e12),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 918e12),
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312e12),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 120GB", "NVIDIA GH200 480GB"), 989e12),
    **dict.fromkeys(("NVIDIA H100 NVL", "NVIDIA H200 NVL"), 835e12),
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA B200": 2250e12,
}


class Layer(NamedTuple):
    """Weights that read the same states, by path: the multiply-adds of each one's product, 0 of what scales or is
    added; or attention, whose two products have no weights."""

    weights: dict[str, int]
    block: int = 0  # where they lie in their stack
    attended: int = 0


Chain = list[Layer]  # in the order of the forward pass: each reads what those before it have made


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one pair: its towers' layers, and what they add up to."""

    image_chain: Chain
    text_chain: Chain

    @property
    def image(self) -> int:
        """Of the image tower's forward pass."""
        return _forward(self.image_chain)

    @property
    def text(self) -> int:
        """Of the text tower's forward pass."""
        return _forward(self.text_chain)

    def training(self, factors: Mapping[str, np.ndarray] | None = None) -> int:
        """Returns those of forward and backward; what is computed again to save memory is not counted.

        `factors` are those of `optim.Optimizer`: by path one number, or one for each block; 0 is not trained. None: all
        is trained.
        """
        return sum(_forward(chain) + _backward(chain, factors) for chain in (self.image_chain, self.text_chain))


def of_pair(architecture: Architecture, patch_dropout: float = 0.0, lora: Lora | None = None) -> Flops:
    """Returns what the towers cost, with their adapters; the loss is apart, since it depends on the batch."""
    rank, embed_dim = 0 if lora is None else lora.rank, architecture.embed_dim
    chains = _image(architecture.image, embed_dim, patch_dropout, rank), _text(architecture.text, embed_dim, rank)
    return Flops(*chains)


def of_loss(rows: int, columns: int, embed_dim: int, *, ring: bool, sides: int = 2) -> int:
    """Returns those of the loss and its gradients: cosines, in the ring twice, and a product for each side that is
    trained."""
    return 2 * ((2 if ring else 1) + sides) * rows * columns * embed_dim


def _forward(chain: Chain) -> int:
    return 2 * sum(sum(layer.weights.values()) + layer.attended for layer in chain)


def _backward(chain: Chain, factors: Mapping[str, np.ndarray] | None) -> int:
    total, reached = 0, False  # is anything trained before this layer?
    for weights, block, attended in chain:
        trained = [path for path in weights if factors is None or factors[path].flat[block]]
        total += sum(weights[path] for path in trained)
        if reached:
            total += sum(weights.values()) + 2 * attended  # each of two products has two gradients of activations
        reached = reached or bool(trained)
    return 2 * total


# What follows counts multiply-adds.


def _still(*paths: str, block: int = 0) -> Layer:
    """Of what scales, or is added or looked up."""
    return Layer(dict.fromkeys(paths, 0), block)


def _norm(path: str, block: int = 0) -> Layer:
    return _still(f"{path}/scale", f"{path}/bias", block=block)


def _linear(path: str, inputs: int, outputs: int, *, rank: int = 0, apart: int = 1, block: int = 0) -> Chain:
    """Of one position; an adapter's A reads what the kernel reads, and B what A has made."""
    weights = {f"{path}/kernel": inputs * outputs, f"{path}/bias": 0}
    if not rank:
        return [Layer(weights, block)]
    weights[f"{path}/lora_a"] = inputs * apart * rank
    return [Layer(weights, block), Layer({f"{path}/lora_b": rank * outputs}, block)]


def _at(positions: int, chain: Chain) -> Chain:
    """Of so many positions."""
    return [layer._replace(weights={path: positions * n for path, n in layer.weights.items()}) for layer in chain]


def _block(path: str, block: int, tower: ViTTower | TextTower, positions: int, rank: int) -> Chain:
    width, mlp_dim = tower.width, tower.mlp_dim
    place = {"rank": rank, "block": block}
    return [
        _norm(f"{path}/attention_norm", block),
        *_at(positions, _linear(f"{path}/attention/qkv", width, 3 * width, apart=3, **place)),
        Layer({}, attended=2 * positions**2 * width),
        *_at(positions, _linear(f"{path}/attention/out", width, width, **place)),
        _norm(f"{path}/mlp_norm", block),
        *_at(positions, _linear(f"{path}/mlp/up", width, mlp_dim, **place)),
        *_at(positions, _linear(f"{path}/mlp/down", mlp_dim, width, **place)),
    ]


def _blocks(path: str, tower: ViTTower | TextTower, positions: int, rank: int) -> Chain:
    return [layer for block in range(tower.depth) for layer in _block(path, block, tower, positions, rank)]


@functools.singledispatch
def _image(tower: ImageTower, embed_dim: int, patch_dropout: float, rank: int) -> Chain:
    raise AssertionError(f"no such tower: {tower}")


@_image.register
def _vit(tower: ViTTower, embed_dim: int, patch_dropout: float, rank: int) -> Chain:
    width, seen = tower.width, tower.patches_kept(patch_dropout)
    embed = {"image/patch_embed/kernel": tower.num_patches * 3 * tower.patch_size**2 * width}
    return [
        Layer(embed | ({"image/patch_embed/bias": 0} if tower.patch_bias else {})),
        _still("image/positional_embedding", *["image/class_embedding"] * tower.class_token),
        *[_norm("image/pre_norm")] * tower.pre_norm,
        *_blocks("image/blocks", tower, seen + tower.class_token, rank),
        _norm("image/post_norm"),
        *(_map_pool(tower, seen) if tower.pool == "map" else []),
        *[Layer({"image/projection": width * embed_dim})] * tower.projection,
    ]


def _map_pool(tower: ViTTower, patches: int) -> Chain:
    """Of one query, which is the same for all pairs, and costs nothing."""
    path, width, mlp_dim = "image/map_pool", tower.width, tower.mlp_dim
    return [
        Layer({f"{path}/qkv/kernel": 2 * patches * width**2, f"{path}/qkv/bias": 0, f"{path}/probe": 0}),
        Layer({}, attended=2 * patches * width),
        *_linear(f"{path}/out", width, width),
        _norm(f"{path}/norm"),
        *_linear(f"{path}/mlp/up", width, mlp_dim),
        *_linear(f"{path}/mlp/down", mlp_dim, width),
    ]


@_image.register
def _resnet(tower: ResNetTower, embed_dim: int, patch_dropout: float, rank: int) -> Chain:
    width, side = tower.width, tower.image_size // 2
    stem = ((3, width // 2), (width // 2, width // 2), (width // 2, width))
    chain = [_conv(f"image/stem{n}", side, 3, *widths) for n, widths in enumerate(stem, 1)]
    side, inner = side // 2, width
    for stage, depth in enumerate(tower.depths, 1):
        middle, pool = width * 2 ** (stage - 1), 1 if stage == 1 else 2
        chain += _bottleneck(f"image/stage{stage}/first", side, inner, middle, pool=pool)
        side, inner = side // pool, 4 * middle
        for block in range(depth - 1):
            chain += _bottleneck(f"image/stage{stage}/rest", side, inner, middle, block=block)
    path, positions = "image/attention_pool", tower.num_patches + 1  # whose one query is the mean
    query, key, value = (_linear(f"{path}/{part}", inner, inner) for part in ("query", "key", "value"))
    [read] = zip(query, *(_at(positions, part) for part in (key, value)), strict=True)
    return [
        *chain,
        _still(f"{path}/positional_embedding"),
        Layer({name: n for layer in read for name, n in layer.weights.items()}),
        Layer({}, attended=2 * positions * inner),
        *_linear(f"{path}/out", inner, embed_dim),
    ]


def _conv(path: str, side: int, size: int, inputs: int, outputs: int, block: int = 0) -> Layer:
    product = {f"{path}/kernel": side**2 * size**2 * inputs * outputs}
    return Layer(product | _norm(f"{path}/norm").weights, block)


def _bottleneck(path: str, side: int, inner: int, middle: int, *, pool: int = 0, block: int = 0) -> Chain:
    """Of one that keeps the shape; or, with a `pool`, of one that changes it, with a convolution beside it."""
    small = side // (pool or 1)
    first = _conv(f"{path}/conv1", side, 1, inner, middle, block)
    beside = _conv(f"{path}/shortcut", small, 1, inner, 4 * middle, block).weights if pool else {}
    return [
        first._replace(weights=first.weights | beside),
        _conv(f"{path}/conv2", side, 3, middle, middle, block),
        _conv(f"{path}/conv3", small, 1, middle, 4 * middle, block),
    ]


def _text(tower: TextTower, embed_dim: int, rank: int) -> Chain:
    projection = {"text/projection": tower.width * embed_dim} if tower.projection else {}
    return [
        _still("text/token_embedding", "text/positional_embedding"),
        *_blocks("text/blocks", tower, tower.context_length, rank),
        _norm("text/post_norm"),
        Layer(projection | ({"text/projection_bias": 0} if tower.projection_bias else {})),
    ]
