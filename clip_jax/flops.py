"""How many FLOP a pair costs, what the architecture asks for whatever the compiler makes of it; and what a chip can do.

Two a multiply-add of every matrix product and convolution, attention scores included, masked ones too; norms,
activations and look-ups are not counted. Texts are at full length.
"""

import dataclasses
import functools
from collections.abc import Collection

from clip_jax.architecture import Architecture, ImageTower, ResNetTower, TextTower, ViTTower

BACKWARD = 2  # times the forward pass: a product's two gradients are each a product of the same size

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


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of the forward pass of one pair."""

    image: int
    text: int

    def training(self, frozen: Collection[str] = ()) -> int:
        """Returns those of forward and backward; what is computed again to save memory is not counted.

        `frozen` names towers, "image" or "text", none of whose parameters is trained: they have no backward pass.
        """
        return sum(n * (1 if tower in frozen else 1 + BACKWARD) for tower, n in dataclasses.asdict(self).items())


def of_pair(architecture: Architecture, patch_dropout: float = 0.0) -> Flops:
    """Returns what the towers cost; the loss is apart, since it depends on the batch."""
    image = _image(architecture.image, patch_dropout) + _projection(architecture.image, architecture.embed_dim)
    text = _text(architecture.text) + _projection(architecture.text, architecture.embed_dim)
    return Flops(2 * image, 2 * text)


def of_loss(rows: int, columns: int, embed_dim: int, *, ring: bool) -> int:
    """Returns those of the loss and its gradients: cosines, in the ring twice, and a product for each side."""
    return 2 * (4 if ring else 3) * rows * columns * embed_dim


# What follows counts multiply-adds.


def _block(positions: int, width: int, mlp_dim: int) -> int:
    """Of queries, keys, values and the way out; of the MLP; of scores and what they weigh."""
    return positions * (4 * width**2 + 2 * width * mlp_dim) + 2 * positions**2 * width


@functools.singledispatch
def _image(tower: ImageTower, patch_dropout: float) -> int:
    raise AssertionError(f"no such tower: {tower}")


@_image.register
def _vit(tower: ViTTower, patch_dropout: float) -> int:
    patches = tower.num_patches
    seen = tower.patches_kept(patch_dropout)
    embed = patches * 3 * tower.patch_size**2 * tower.width
    blocks = tower.depth * _block(seen + tower.class_token, tower.width, tower.mlp_dim)
    return embed + blocks + (_map_pool(tower, seen) if tower.pool == "map" else 0)


def _map_pool(tower: ViTTower, patches: int) -> int:
    """Of keys and values, the way out, the MLP, one query's scores."""
    return (2 * patches + 1) * tower.width**2 + 2 * tower.width * tower.mlp_dim + 2 * patches * tower.width


@_image.register
def _resnet(tower: ResNetTower, patch_dropout: float) -> int:
    width, side = tower.width, tower.image_size // 2
    total = side**2 * 9 * (3 * width // 2 + (width // 2) ** 2 + width // 2 * width)
    side, inner = side // 2, width
    for stage, depth in enumerate(tower.depths):
        middle = width * 2**stage
        wide, stride = 4 * middle, 1 if stage == 0 else 2
        for block in range(depth):
            total += side**2 * (inner * middle + 9 * middle**2)
            if block == 0:
                side //= stride
                total += side**2 * inner * wide
            total += side**2 * middle * wide
            inner = wide
    positions = tower.num_patches + 1
    return total + (2 * positions + 1) * inner**2 + 2 * positions * inner  # attention whose one query is the mean


def _text(tower: TextTower) -> int:
    return tower.depth * _block(tower.context_length, tower.width, tower.mlp_dim)


def _projection(tower: ImageTower | TextTower, embed_dim: int) -> int:
    """Of one position; a ResNet's attention pool ends in it."""
    if isinstance(tower, ResNetTower):
        return 32 * tower.width * embed_dim
    return tower.width * embed_dim if tower.projection else 0
