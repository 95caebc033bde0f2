"""timm's SigLIP towers, which OpenCLIP has its SigLIP models look through: a name stands for all sizes.

It stands for an activation, too, and not always for the one that the weights were trained with. Names, sizes and
activations are those of timm 1.0.31.
"""

import dataclasses

from clip_jax.architecture import ViTTower
from clip_jax.models.variants import siglip_tower
from clip_jax.weights.mapping import Rule
from clip_jax.weights.modules import MLP, NORM

TOWERS = {
    "vit_base_patch32_siglip_256": siglip_tower("B", 32, 256, "gelu_tanh"),
    "vit_base_patch16_siglip_224": siglip_tower("B", 16, 224),
    "vit_base_patch16_siglip_256": siglip_tower("B", 16, 256),
    "vit_base_patch16_siglip_384": siglip_tower("B", 16, 384),
    "vit_base_patch16_siglip_512": siglip_tower("B", 16, 512),
    "vit_large_patch16_siglip_256": siglip_tower("L", 16, 256),
    "vit_large_patch16_siglip_384": siglip_tower("L", 16, 384),
    "vit_large_patch16_siglip_512": siglip_tower("L", 16, 512, "gelu_tanh"),
    "vit_so400m_patch14_siglip_224": siglip_tower("SO400M", 14, 224),
    "vit_so400m_patch14_siglip_378": siglip_tower("SO400M", 14, 378),
    "vit_so400m_patch14_siglip_384": siglip_tower("SO400M", 14, 384),  # of which it sees 378
    "vit_so400m_patch16_siglip_256": siglip_tower("SO400M", 16, 256, "gelu_tanh"),
    "vit_so400m_patch16_siglip_384": siglip_tower("SO400M", 16, 384, "gelu_tanh"),
    "vit_so400m_patch16_siglip_512": siglip_tower("SO400M", 16, 512, "gelu_tanh"),
    "vit_giantopt_patch16_siglip_256": siglip_tower("gopt", 16, 256, "gelu_tanh"),
    "vit_giantopt_patch16_siglip_384": siglip_tower("gopt", 16, 384, "gelu_tanh"),
}

BLOCK = (
    *(rule.inside("norm1", "attention_norm") for rule in NORM),
    Rule("attn.qkv.weight", "attention/qkv/kernel", "(T N K) D -> D T N K"),
    Rule("attn.qkv.bias", "attention/qkv/bias", "(T N K) -> T N K"),
    Rule("attn.proj.weight", "attention/out/kernel", "D (N K) -> N K D"),
    Rule("attn.proj.bias", "attention/out/bias", "D -> D"),
    *(rule.inside("norm2", "mlp_norm") for rule in NORM),
    *(rule.inside("mlp", "mlp") for rule in MLP),
)
POOL = (
    Rule("latent", "probe", "1 1 D -> D"),
    Rule("q.weight", "qkv/kernel[:, 0]", "(N K) D -> D N K"),
    Rule("q.bias", "qkv/bias[0]", "(N K) -> N K"),
    Rule("kv.weight", "qkv/kernel[:, 1:]", "(T N K) D -> D T N K"),
    Rule("kv.bias", "qkv/bias[1:]", "(T N K) -> T N K"),
    Rule("proj.weight", "out/kernel", "D (N K) -> N K D"),
    Rule("proj.bias", "out/bias", "D -> D"),
    *(rule.inside("norm", "norm") for rule in NORM),
    *(rule.inside("mlp", "mlp") for rule in MLP),
)
RULES = (
    Rule("patch_embed.proj.weight", "patch_embed/kernel", "D C H W -> H W C D"),
    Rule("patch_embed.proj.bias", "patch_embed/bias", "D -> D"),
    Rule("pos_embed", "positional_embedding", "1 P D -> P D"),
    *(rule.inside("blocks.{i}", "blocks", "[i]") for rule in BLOCK),
    *(rule.inside("norm", "post_norm") for rule in NORM),
    *(rule.inside("attn_pool", "map_pool") for rule in POOL),
)


def nearest_tower(tower: ViTTower) -> str:
    """Returns the name of the tower that is most like this one: by its sizes, by what it computes, by its images."""

    says = dataclasses.asdict(tower)

    def distance(name: str) -> tuple[int, bool, int]:
        other = dataclasses.asdict(TOWERS[name])
        sizes = other.keys() - {"image_size", "activation"}
        differing = sum(other[field] != says[field] for field in sizes)
        return differing, other["activation"] != tower.activation, abs(other["image_size"] - tower.image_size)

    return min(TOWERS, key=distance)
