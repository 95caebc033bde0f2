"""What PyTorch's and timm's modules call their parameters, wherever a model has them: parts of the weight tables."""

from clip_jax.weights.mapping import Rule

# torch.nn.LayerNorm
NORM = (
    Rule("weight", "scale", "D -> D"),
    Rule("bias", "bias", "D -> D"),
)
# torch.nn.MultiheadAttention, which has queries, keys and values in one matrix
ATTENTION = (
    Rule("in_proj_weight", "qkv/kernel", "(T N K) D -> D T N K"),
    Rule("in_proj_bias", "qkv/bias", "(T N K) -> T N K"),
    Rule("out_proj.weight", "out/kernel", "D (N K) -> N K D"),
    Rule("out_proj.bias", "out/bias", "D -> D"),
)
# timm's and Hugging Face's MLP
MLP = (
    Rule("fc1.weight", "up/kernel", "F D -> D F"),
    Rule("fc1.bias", "up/bias", "F -> F"),
    Rule("fc2.weight", "down/kernel", "D F -> F D"),
    Rule("fc2.bias", "down/bias", "D -> D"),
)
