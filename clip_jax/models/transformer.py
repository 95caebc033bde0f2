"""A stack of pre-norm residual blocks: one block is compiled and scanned over its stacked parameters."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.architecture import Lora, TextTower, ViTTower
from clip_jax.models.attention import CUDNN, KEPT
from clip_jax.models.layers import MLP, Attention, LayerNorm, Linear, adapted, normal, uniform, zeros
from clip_jax.typing import Float, Int

# What the backward pass finds in memory, by the config's word; the rest is computed again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_from_both_policies(  # its results, and what norms divide by
        jax.checkpoint_policies.save_only_these_names(KEPT), lambda primitive, *_, **__: primitive.name == CUDNN
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
ADAPTERS = 1_000_000  # folded into a block's key, of which the numbers from 0 on are its own
Pieces = tuple[Float[jax.Array, "B _ D"], ...]  # what a sequence is cut into; together they are the whole


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a tower is computed; what its weights mean does not change, though adapters may stand beside them."""

    dtype: str = "float32"  # of activations and products
    remat: str = "none"  # a word of REMAT
    attention: str = "xla"  # whose kernels compute it: "xla" or "cudnn"
    patch_dropout: float = 0.0  # share of an image's patches that are left out in training
    unroll: bool = False  # blocks are compiled one by one, not scanned: for inference on a CPU
    rows: NamedSharding | None = None  # where a batch's rows are to stay between blocks; None: the compiler's choice
    lora: Lora | None = None  # adapters in all blocks of both towers; only a ViT's image tower has any
    fixed_image: int = 0  # the first blocks of a ViT: they, and what comes before them, have no backward pass
    fixed_text: int = 0

    @property
    def wide(self) -> jnp.dtype:
        """Returns the dtype of parameters and of pixels before the towers: float32, or wider when these compute so."""
        return jax.dtypes.canonicalize_dtype(jnp.promote_types(self.dtype, jnp.float32))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), of a sequence that may come in pieces."""

    def __init__(self, width: int, *, eps: float, attention: Attention, mlp: MLP):
        self.attention_norm = LayerNorm(width, eps=eps)
        self.attention = attention
        self.mlp_norm = LayerNorm(width, eps=eps)
        self.mlp = mlp

    def __call__(self, pieces: Pieces, at_B: Int[jax.Array, " B"] | None = None) -> Pieces:
        """Returns the states of all positions, or of one position a row."""
        mixed = self.attention(tuple(self.attention_norm(x) for x in pieces), at_B)
        if at_B is not None:
            pieces = tuple(take(x, at_B) for x in pieces)
        pieces = tuple(x + more for x, more in zip(pieces, mixed, strict=True))
        return tuple(x + self.mlp(self.mlp_norm(x)) for x in pieces)


def image_block(key: jax.Array, tower: ViTTower, compute: Compute) -> Block:
    """Returns a block initialised by PyTorch's defaults, which is what OpenAI's image Transformer starts from."""
    width, mlp_dim, heads = tower.width, tower.mlp_dim, (tower.num_heads, tower.width // tower.num_heads)
    qkv, up, up_bias, out, down, down_bias = jax.random.split(key, 6)
    xavier = (6 / (width + 3 * width)) ** 0.5  # PyTorch draws queries, keys and values as one matrix
    return Block(
        width,
        eps=tower.eps,
        attention=Attention(
            qkv=Linear(uniform(qkv, (width, 3, *heads), xavier), zeros((3, *heads))),
            out=Linear(uniform(out, (*heads, width), width**-0.5), zeros((width,))),
            causal=False,
            implementation=compute.attention,
        ),
        mlp=MLP(
            up=Linear(uniform(up, (width, mlp_dim), width**-0.5), uniform(up_bias, (mlp_dim,), width**-0.5)),
            down=Linear(uniform(down, (mlp_dim, width), mlp_dim**-0.5), uniform(down_bias, (width,), mlp_dim**-0.5)),
            activation=tower.activation,
        ),
    )


def text_block(key: jax.Array, tower: TextTower, compute: Compute) -> Block:
    """Returns a block initialised as OpenAI's: what goes into the residual shrinks with the depth."""
    width, mlp_dim, heads = tower.width, tower.mlp_dim, (tower.num_heads, tower.width // tower.num_heads)
    qkv, up, up_bias, out, down, down_bias = jax.random.split(key, 6)
    residual = width**-0.5 * (2 * tower.depth) ** -0.5
    return Block(
        width,
        eps=tower.eps,
        attention=Attention(
            qkv=Linear(normal(qkv, (width, 3, *heads), width**-0.5), zeros((3, *heads))),
            out=Linear(normal(out, (*heads, width), residual), zeros((width,))),
            causal=tower.causal,
            implementation=compute.attention,
        ),
        mlp=MLP(
            up=Linear(normal(up, (width, mlp_dim), (2 * width) ** -0.5), uniform(up_bias, (mlp_dim,), width**-0.5)),
            down=Linear(normal(down, (mlp_dim, width), residual), uniform(down_bias, (width,), mlp_dim**-0.5)),
            activation=tower.activation,
        ),
    )


def stack(block: Callable[..., Block], key: jax.Array, tower: ViTTower | TextTower, compute: Compute) -> Block:
    """Returns all blocks of a tower, each of its own key, as one `Block` whose parameters have a leading dimension
    `depth`."""

    def one(key: jax.Array) -> Block:
        made = block(key, tower, compute)
        return made if compute.lora is None else with_adapters(made, compute.lora, jax.random.fold_in(key, ADAPTERS))

    return jax.vmap(one)(jax.random.split(key, tower.depth))


def with_adapters(block: Block, lora: Lora, key: jax.Array) -> Block:
    """Returns the block with adapters beside its kernels; queries, keys and values have each their own."""
    qkv, out, up, down = jax.random.split(key, 4)
    attention, mlp = block.attention, block.mlp
    attention.qkv = adapted(attention.qkv, lora, qkv, apart=1)
    attention.out = adapted(attention.out, lora, out)
    mlp.up, mlp.down = adapted(mlp.up, lora, up), adapted(mlp.down, lora, down)
    return block


def states(blocks: Block, x_BLD: Float[jax.Array, "B L D"]) -> Float[jax.Array, "depth B L D"]:
    """Returns what comes out of every block."""

    def apply(pieces, block):
        pieces = block(pieces)
        return pieces, pieces[0]

    return jax.lax.scan(apply, (x_BLD,), blocks)[1]


def run(
    blocks: Block, pieces: Pieces, compute: Compute, at_B: Int[jax.Array, " B"] | None = None, *, fixed: int = 0
) -> Pieces:
    """Returns what the stacked blocks, one after the other, make of a sequence: at all positions, or, of a sequence
    that is whole, at one of each row.

    The first `fixed` blocks, and what comes before them, have gradients of 0, which cost nothing. Unrolled, for
    inference, each block is compiled by itself, and the last computes nothing but that position.
    """
    if compute.unroll:
        *most, last = [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(blocks.mlp.up.bias.shape[0])]
        for block in most:
            pieces = block(pieces)
        return last(pieces, at_B)

    def apply(pieces, block):
        return stay(block(stay(pieces, compute)), compute), None

    if fixed:
        still = jax.lax.stop_gradient(blocks)

        def apply_nth(pieces, n):  # by number: a scan over a part of the stack would begin with a copy of it
            return apply(pieces, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, n, keepdims=False), still))

        pieces = jax.lax.scan(apply_nth, jax.lax.stop_gradient(pieces), jnp.arange(fixed))[0]
        blocks = jax.tree.map(lambda x: x[fixed:], blocks)
    if REMAT[compute.remat] is not None:
        # The scan keeps the two passes apart: nothing else has to.
        apply = jax.checkpoint(apply, policy=REMAT[compute.remat], prevent_cse=False)
    pieces = jax.lax.scan(apply, pieces, blocks)[0]
    return pieces if at_B is None else tuple(take(x, at_B) for x in pieces)


def stay(x: jax.Array | Pieces, compute: Compute) -> jax.Array | Pieces:
    """Returns activations that are split by rows alone. Where weights are split, too, a compiler may otherwise gather
    the rows and split the width: another use of the mesh, that needs many times the memory."""
    return x if compute.rows is None else jax.lax.with_sharding_constraint(x, compute.rows)


def everywhere(x: jax.Array, compute: Compute) -> jax.Array:
    """Returns a weight whole on every device: that is less to move than what a look-up in its parts finds."""
    if compute.rows is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(compute.rows.mesh, PartitionSpec()))


def take(x_BLD: Float[jax.Array, "B L D"], at_B: Int[jax.Array, " B"]) -> Float[jax.Array, "B 1 D"]:
    """Returns one position of each row."""
    return jnp.take_along_axis(x_BLD, at_B[:, None, None], axis=1)
