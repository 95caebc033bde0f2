"""The architectures by name. OpenAI's names have a slash, OpenCLIP's a dash: "ViT-B/32" computes QuickGELU, and
"ViT-B-32" GELU, as their weights were trained."""

import dataclasses

from clip_jax.architecture import Architecture, ImageTower, Preprocess, ResNetTower, TextTower, Tokenize, ViTTower
from clip_jax.config import ModelConfig
from clip_jax.errors import UserError, about, all_of, nearest

# Pixel statistics and resizing of the families that do not use OpenAI's.
SIGLIP_PREPROCESS = Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize="squash")
CLIPA_PREPROCESS = Preprocess(
    (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize="squash", interpolation="bilinear"
)  # ImageNet's


def resized(named: Architecture, image_size: int | None = None, context_length: int | None = None) -> Architecture:
    """Returns the architecture for images and captions of another size; None: as it is.

    Raises:
        UserError: an image size that the patch does not divide, a context without room; both.
    """
    image, text = named.image, named.text
    image, text = all_of(
        lambda: _of_size(image, image_size),
        lambda: text if context_length is None else dataclasses.replace(text, context_length=context_length),
    )
    return dataclasses.replace(named, image=image, text=text)


def _of_size(tower: ImageTower, image_size: int | None) -> ImageTower:
    if image_size is None or image_size == tower.image_size:
        return tower
    tower = dataclasses.replace(tower, image_size=image_size)
    tower.check_divided()
    return tower


def _vit(embed_dim: int, image: tuple, text: tuple, *, context_length: int = 77, **image_changes) -> Architecture:
    """Returns an architecture from (size, patch, width, depth, heads) and (width, depth, heads); the activation, and
    an MLP of another width than four times the tower's, by name."""
    size, patch, width, depth, heads = image
    text_width, text_depth, text_heads = text
    activation = image_changes.setdefault("activation", "quick_gelu")
    image_changes.setdefault("mlp_dim", 4 * width)
    return Architecture(
        embed_dim,
        ViTTower(size, patch, width, depth, heads, **image_changes),
        TextTower(context_length, 49408, text_width, text_depth, text_heads, 4 * text_width, activation),
    )


def _resnet(embed_dim: int, image: tuple, text_width: int) -> Architecture:
    """Returns one of OpenAI's from (size, width, depths) and the text tower's width; all heads are 64 wide."""
    size, width, depths = image
    return Architecture(
        embed_dim,
        ResNetTower(size, width, depths, 32 * width // 64),
        TextTower(77, 49408, text_width, 12, text_width // 64, 4 * text_width),
    )


def with_activation(named: Architecture, activation: str) -> Architecture:
    """Returns the architecture with one activation in both towers; a ResNet has none of its own."""
    image = (
        named.image if isinstance(named.image, ResNetTower) else dataclasses.replace(named.image, activation=activation)
    )
    return dataclasses.replace(named, image=image, text=dataclasses.replace(named.text, activation=activation))


def _worldwide(named: Architecture, vocab_size: int, eos_id: int, tokenize: Tokenize) -> Architecture:
    """Returns MetaCLIP 2's (arXiv 2507.22062): many languages, pooled at the tokenizer's own end of a sentence."""
    text = dataclasses.replace(named.text, vocab_size=vocab_size, pool="eos", eos_id=eos_id)
    return dataclasses.replace(named, text=text, tokenize=tokenize)


def _clipa(named: Architecture) -> Architecture:
    """Returns CLIPA's (arXiv 2305.07017): the mean of the patches, a short text seen both ways, BERT's words."""
    image = dataclasses.replace(named.image, pool="mean", pre_norm=False, norm_after_pool=True)
    text = dataclasses.replace(named.text, context_length=32, vocab_size=32000, causal=False, pool="last")
    tokenize = Tokenize("file", clean="whitespace", blank_id=102)
    return dataclasses.replace(named, image=image, text=text, preprocess=CLIPA_PREPROCESS, tokenize=tokenize)


# SigLIP's towers: (width, depth, heads, MLP width).
SIGLIP_TOWERS = {
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "SO400M": (1152, 27, 16, 4304),
    "gopt": (1536, 40, 16, 6144),
}
# The vocabularies, with the id that fills a text up: C4's, mC4's, Gemma's.
SIGLIP_VOCABULARIES = {"en": (32_000, 1), "i18n": (250_000, 1), "v2": (256_000, 0)}


def siglip_tower(size: str, patch_size: int, image_size: int, activation: str = "gelu") -> ViTTower:
    """Returns SigLIP's image tower, which has neither a class token nor a projection."""
    return ViTTower(
        image_size,
        patch_size,
        *SIGLIP_TOWERS[size],
        activation=activation,
        eps=1e-6,
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        projection=False,
    )


def _siglip(
    size: str, patch_size: int, image_size: int, vocabulary: str = "en", activation: str = "gelu", **text_changes
) -> Architecture:
    """Returns SigLIP (arXiv 2303.15343) or SigLIP 2 (arXiv 2502.14786) as OpenCLIP computes it; `activation` is the
    image tower's. Hugging Face computes GELU's tanh approximation throughout, as the weights were trained."""
    image, (vocab_size, pad_id) = (
        siglip_tower(size, patch_size, image_size, activation),
        SIGLIP_VOCABULARIES[vocabulary],
    )
    text = TextTower(
        64,
        vocab_size,
        *SIGLIP_TOWERS["SO400M" if size == "gopt" else size],
        activation="gelu_tanh" if vocabulary == "v2" else "gelu",
        eps=1e-6,
        causal=False,
        pool="last",
        projection_bias=True,
    )
    return Architecture(
        image.width,
        image,
        dataclasses.replace(text, **text_changes),
        SIGLIP_PREPROCESS,
        Tokenize("file", clean="canonicalize", pad_id=pad_id),
        logit_bias=True,
    )


# OpenAI's: arXiv 2103.00020, tables 19 and 20, in the order of its `available_models()`.
OPENAI = {
    "RN50": _resnet(1024, (224, 64, (3, 4, 6, 3)), 512),
    "RN101": _resnet(512, (224, 64, (3, 4, 23, 3)), 512),
    "RN50x4": _resnet(640, (288, 80, (4, 6, 10, 6)), 640),
    "RN50x16": _resnet(768, (384, 96, (6, 8, 18, 8)), 768),
    "RN50x64": _resnet(1024, (448, 128, (3, 15, 36, 10)), 1024),
    "ViT-B/32": _vit(512, (224, 32, 768, 12, 12), (512, 12, 8)),
    "ViT-B/16": _vit(512, (224, 16, 768, 12, 12), (512, 12, 8)),
    "ViT-L/14": _vit(768, (224, 14, 1024, 24, 16), (768, 12, 12)),
    "ViT-L/14@336px": _vit(768, (336, 14, 1024, 24, 16), (768, 12, 12)),
}
# Ours, for two CPU cores: W64 is the width of both towers.
SMALL = {
    "ViT-W64/4@16px": _vit(64, (16, 4, 64, 3, 4), (64, 2, 4), context_length=16),
    "ViT-W96/8@40px": _vit(96, (40, 8, 96, 3, 4), (64, 2, 4), context_length=20),
}
RESNETS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
# OpenCLIP's, with GELU. Heads are 64 wide but in H, g, bigG and e.
_B, _L, _H = (512, 12, 8), (768, 12, 12), (1024, 24, 16)
_BIGG = (1280, 32, 20)
_GELU = {
    "ViT-S-32": _vit(384, (224, 32, 384, 12, 6), (384, 12, 6)),
    "ViT-S-32-alt": _vit(256, (224, 32, 384, 12, 6), (256, 10, 4)),
    "ViT-S-16": _vit(384, (224, 16, 384, 12, 6), (384, 12, 6)),
    "ViT-S-16-alt": _vit(256, (224, 16, 384, 12, 6), (256, 10, 4)),
    "ViT-M-32": _vit(512, (224, 32, 512, 12, 8), _B),
    "ViT-M-32-alt": _vit(384, (224, 32, 512, 12, 8), (384, 12, 6)),
    "ViT-M-16": _vit(512, (224, 16, 512, 12, 8), _B),
    "ViT-B-32": _vit(512, (224, 32, 768, 12, 12), _B),
    "ViT-B-32-256": _vit(512, (256, 32, 768, 12, 12), _B),
    "ViT-B-32-plus-256": _vit(640, (256, 32, 896, 12, 14), (640, 12, 10)),
    "ViT-B-16": _vit(512, (224, 16, 768, 12, 12), _B),
    "ViT-B-16-plus": _vit(640, (224, 16, 896, 12, 14), (640, 12, 10)),
    "ViT-B-16-plus-240": _vit(640, (240, 16, 896, 12, 14), (640, 12, 10)),
    "ViT-L-16": _vit(768, (224, 16, 1024, 24, 16), _L),
    "ViT-L-16-320": _vit(768, (320, 16, 1024, 24, 16), _L),
    "ViT-L-14": _vit(768, (224, 14, 1024, 24, 16), _L),
    "ViT-L-14-280": _vit(768, (280, 14, 1024, 24, 16), _L),
    "ViT-L-14-336": _vit(768, (336, 14, 1024, 24, 16), _L),
    "ViT-H-16": _vit(1024, (224, 16, 1280, 32, 16), _H),
    "ViT-H-14": _vit(1024, (224, 14, 1280, 32, 16), _H),
    "ViT-H-14-378": _vit(1024, (378, 14, 1280, 32, 16), _H),
    "ViT-g-14": _vit(1024, (224, 14, 1408, 40, 16), _H, mlp_dim=6144),
    "ViT-bigG-14": _vit(1280, (224, 14, 1664, 48, 16), _BIGG, mlp_dim=8192),
    "ViT-e-14": _vit(1280, (224, 14, 1792, 56, 16), (1280, 36, 20), mlp_dim=15360),
}
_GELU = {name: with_activation(named, "gelu") for name, named in _GELU.items()}
_XLM_V = (901_629, 2, Tokenize("file", clean="whitespace", pad_id=1))
_MT5 = (250_100, 1, Tokenize("file", clean="canonicalize", pad_id=0))
OPEN_CLIP = _GELU | {
    # a ResNet itself computes ReLU; "RN50" alone is OpenAI's, in OpenCLIP it is what is "RN50-gelu" here
    **{f"{name}-quickgelu": OPENAI[name] for name in RESNETS},
    **{f"{name}-gelu": with_activation(OPENAI[name], "gelu") for name in RESNETS},
    **{
        f"{name}-quickgelu": with_activation(_GELU[name], "quick_gelu")
        for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-H-14-378", "ViT-bigG-14")
    },
    "ViT-L-14-worldwide": _worldwide(_GELU["ViT-L-14"], *_MT5),
    "ViT-L-14-worldwide-quickgelu": _worldwide(with_activation(_GELU["ViT-L-14"], "quick_gelu"), *_MT5),
    "ViT-H-14-worldwide": _worldwide(_GELU["ViT-H-14"], *_XLM_V),
    "ViT-H-14-worldwide-378": _worldwide(_GELU["ViT-H-14-378"], *_XLM_V),
    "ViT-H-14-worldwide-quickgelu": _worldwide(with_activation(_GELU["ViT-H-14"], "quick_gelu"), *_XLM_V),
    "ViT-bigG-14-worldwide": _worldwide(_GELU["ViT-bigG-14"], *_XLM_V),
    "ViT-bigG-14-worldwide-378": _worldwide(resized(_GELU["ViT-bigG-14"], 378), *_XLM_V),
    "ViT-L-14-CLIPA": _clipa(_GELU["ViT-L-14"]),
    "ViT-L-14-CLIPA-336": _clipa(_GELU["ViT-L-14-336"]),
    "ViT-H-14-CLIPA": _clipa(_GELU["ViT-H-14"]),
    "ViT-H-14-CLIPA-336": _clipa(resized(_GELU["ViT-H-14"], 336)),
    "ViT-bigG-14-CLIPA": _clipa(_GELU["ViT-bigG-14"]),
    "ViT-bigG-14-CLIPA-336": _clipa(resized(_GELU["ViT-bigG-14"], 336)),
}
SIGLIP = {
    "ViT-B-16-SigLIP": _siglip("B", 16, 224),
    "ViT-B-16-SigLIP-256": _siglip("B", 16, 256),
    "ViT-B-16-SigLIP-384": _siglip("B", 16, 384),
    "ViT-B-16-SigLIP-512": _siglip("B", 16, 512),
    "ViT-B-16-SigLIP-i18n-256": _siglip("B", 16, 256, "i18n"),
    "ViT-L-16-SigLIP-256": _siglip("L", 16, 256),
    "ViT-L-16-SigLIP-384": _siglip("L", 16, 384),
    "ViT-SO400M-14-SigLIP": _siglip("SO400M", 14, 224, context_length=16),
    "ViT-SO400M-14-SigLIP-378": _siglip("SO400M", 14, 378),
    "ViT-SO400M-14-SigLIP-384": _siglip("SO400M", 14, 384),  # of which it sees 378
    "ViT-SO400M-16-SigLIP-i18n-256": _siglip(
        "SO400M", 16, 256, "i18n", "gelu_tanh", projection=False, projection_bias=False
    ),
    "ViT-B-32-SigLIP2-256": _siglip("B", 32, 256, "v2", "gelu_tanh"),
    "ViT-B-16-SigLIP2": _siglip("B", 16, 224, "v2"),
    "ViT-B-16-SigLIP2-256": _siglip("B", 16, 256, "v2"),
    "ViT-B-16-SigLIP2-384": _siglip("B", 16, 384, "v2"),
    "ViT-B-16-SigLIP2-512": _siglip("B", 16, 512, "v2"),
    "ViT-L-16-SigLIP2-256": _siglip("L", 16, 256, "v2"),
    "ViT-L-16-SigLIP2-384": _siglip("L", 16, 384, "v2"),
    "ViT-L-16-SigLIP2-512": _siglip("L", 16, 512, "v2", "gelu_tanh"),
    "ViT-SO400M-14-SigLIP2": _siglip("SO400M", 14, 224, "v2"),
    "ViT-SO400M-14-SigLIP2-378": _siglip("SO400M", 14, 378, "v2"),
    "ViT-SO400M-16-SigLIP2-256": _siglip("SO400M", 16, 256, "v2", "gelu_tanh"),
    "ViT-SO400M-16-SigLIP2-384": _siglip("SO400M", 16, 384, "v2", "gelu_tanh"),
    "ViT-SO400M-16-SigLIP2-512": _siglip("SO400M", 16, 512, "v2", "gelu_tanh"),
    "ViT-gopt-16-SigLIP2-256": _siglip("gopt", 16, 256, "v2", "gelu_tanh"),
    "ViT-gopt-16-SigLIP2-384": _siglip("gopt", 16, 384, "v2", "gelu_tanh"),
}
VARIANTS = OPENAI | SMALL | OPEN_CLIP | SIGLIP


def architecture(model: ModelConfig) -> Architecture:
    """Returns the named architecture with the config's changes.

    Raises:
        UserError: no name, or none of this table, an image size that the patch does not divide, or what `check` says.
    """
    if model.variant is None:
        raise UserError(
            "model.variant=None is what init_from has, which is not read here: set model.variant to its name"
        )
    if model.variant not in VARIANTS:
        raise UserError(f"unknown model variant {model.variant!r}{nearest(model.variant, VARIANTS)}")
    named = VARIANTS[model.variant]
    if model.logit_bias is not None:
        named = dataclasses.replace(named, logit_bias=model.logit_bias)
    arch = resized(named, model.image_size, model.context_length)
    check(model, arch)
    return arch


def check(model: ModelConfig, arch: Architecture) -> None:
    """Raises UserError when the config asks for what the architecture cannot have: a ResNet patches that are dropped,
    or adapters; a text tower that sees behind its captions, to be cut there."""
    if model.patch_dropout and not isinstance(arch.image, ViTTower):
        whose = model.variant or "a ResNet"
        raise UserError(f"model.patch_dropout={model.patch_dropout}: {whose} has no patches; leave it out")
    if model.lora is not None:
        with about(f"model.lora_rank={model.lora_rank}"):
            model.lora.check(arch)
    if lengths := model.compiled_lengths():
        with about(f"model.caption_lengths={model.caption_lengths!r}"):
            if arch.text.sees_padding:
                raise UserError("this text tower reads all of its context, whatever stands in it; leave it out")
            if lengths[-1] >= arch.text.context_length:
                raise UserError(
                    f"must stay below the context length of {arch.text.context_length}, which is there unnamed"
                )
