"""softmax(QKᵀ)V of a sequence that may come in pieces, and a backward pass that computes the scores again.

The scores, [L, M] for every head of every image, and not the products are what attention costs: they are passed over as
seldom as can be. Weights are not normalised; what they add up to comes out of their product with the values, as one
column more, and divides [L, K]. For the backward pass nothing is kept but the result and the logarithm of that sum.

And they are laid out as the hardware likes them. A TPU's rows are 128 numbers: 257 positions fill three as 384 do, 256
fill two. So a class token may be a piece of its own, and the patches another; without a mask the order does not matter.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clip_jax.typing import Bool, Float

Heads = tuple[Float[jax.Array, "B N _ K"], ...]  # one array for each piece of the sequence
KEPT = "attention"  # the name by which a rematerialisation policy knows the results
CUDNN = "dot_product_attention_fwd_wrapper"  # JAX's primitive that computes them by cuDNN's kernels, which have no name


@jax.custom_vjp
def attend(queries: Heads, keys: Heads, values: Heads, seen_LM: Bool[jax.Array, "*B L M"] | None = None) -> Heads:
    """Returns what every query gathers from the values of all pieces; with a mask, of which there is one piece.

    Queries are scaled by the caller. Scores and sums are float32 or wider; the weights that meet the values, and what
    comes out, have the dtype of the values.
    """
    return _forward(queries, keys, values, seen_LM)[0]


def attend_by_cudnn(
    q_BNLK: Float[jax.Array, "B N L K"],
    k_BNLK: Float[jax.Array, "B N L K"],
    v_BNLK: Float[jax.Array, "B N L K"],
    *,
    causal: bool,
) -> Float[jax.Array, "B N L K"]:
    """Returns what `attend` returns for a whole sequence, computed by NVIDIA's kernels, which keep no scores either.

    Queries are scaled by the caller. The kernels have no gradients for an odd number of positions: such a sequence gets
    one more at its end, which none of the others sees.
    """
    length = q_BNLK.shape[2]
    even = ((0, 0), (0, length % 2), (0, 0), (0, 0))
    q_BLNK, k_BLNK, v_BLNK = (jnp.pad(x.swapaxes(1, 2), even) for x in (q_BNLK, k_BNLK, v_BNLK))
    lengths_B = jnp.full(len(q_BNLK), length, jnp.int32) if length % 2 and not causal else None
    result_BLNK = jax.nn.dot_product_attention(
        *(q_BLNK, k_BLNK, v_BLNK),
        scale=1.0,
        is_causal=causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
    return result_BLNK[:, :length].swapaxes(1, 2)


def refused_by_cudnn(shape_NLK: tuple[int, int, int], *, causal: bool, dtype: str, device: jax.Device) -> str | None:
    """Returns why cuDNN does not compute such attention, forward and backward, on a GPU; None: it does.

    It is asked, by compiling it: what a version accepts is written nowhere else.
    """
    if dtype != "bfloat16":
        return f"it takes no {dtype}"
    like = jax.ShapeDtypeStruct((1, *shape_NLK), dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    def total(*qkv: jax.Array) -> jax.Array:
        return attend_by_cudnn(*qkv, causal=causal).sum(dtype=jnp.float32)

    try:
        jax.jit(jax.grad(total, (0, 1, 2))).lower(like, like, like).compile()
    except Exception as error:  # by JAX, by XLA or by cuDNN, each with a class of its own
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _forward(queries: Heads, keys: Heads, values: Heads, seen_LM) -> tuple[Heads, tuple]:
    results, log_sums = zip(*(_gather(q_BNLK, keys, values, seen_LM) for q_BNLK in queries), strict=True)
    return results, (queries, keys, values, seen_LM, results, log_sums)


def _gather(q_BNLK: jax.Array, keys: Heads, values: Heads, seen_LM) -> tuple[jax.Array, jax.Array]:
    """Returns the result for one piece of queries, and the logarithm of the sum of exp(score) over all keys."""
    scores = [_scores(q_BNLK, k_BNMK, seen_LM) for k_BNMK in keys]
    highest_BNL1 = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in scores])
    total_BNLK = sum(
        _product("BNLM,BNMK->BNLK", jnp.exp(x - highest_BNL1), _with_ones(v_BNMK))
        for x, v_BNMK in zip(scores, values, strict=True)
    )
    sum_BNL1 = total_BNLK[..., -1:]
    result_BNLK = (total_BNLK[..., :-1] / sum_BNL1).astype(q_BNLK.dtype)
    log_sum_BNL = (highest_BNL1 + jnp.log(sum_BNL1))[..., 0]
    return checkpoint_name(result_BNLK, KEPT), checkpoint_name(log_sum_BNL, KEPT)


def _backward(kept: tuple, cotangents: Heads) -> tuple[Heads, Heads, Heads, None]:
    """Returns the gradients of queries, keys and values; with weights P = exp(S - log Σ exp S) of the result O = PV
    they are those of the scores, dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)), and dV = Pᵀ dO."""
    queries, keys, values, seen_LM, results, log_sums = kept
    d_queries, d_keys, d_values = [0] * len(queries), [0] * len(keys), [0] * len(keys)
    for i, (q_BNLK, d_BNLK) in enumerate(zip(queries, cotangents, strict=True)):
        wide = jnp.promote_types(d_BNLK.dtype, jnp.float32)
        shared_BNL1 = (d_BNLK.astype(wide) * results[i].astype(wide)).sum(-1, keepdims=True)
        for j, (k_BNMK, v_BNMK) in enumerate(zip(keys, values, strict=True)):
            weights_BNLM = jnp.exp(_scores(q_BNLK, k_BNMK, seen_LM) - log_sums[i][..., None])
            d_scores_BNLM = weights_BNLM * (_product("BNLK,BNMK->BNLM", d_BNLK, v_BNMK) - shared_BNL1)
            d_queries[i] += _product("BNLM,BNMK->BNLK", d_scores_BNLM, k_BNMK)
            d_keys[j] += _product("BNLM,BNLK->BNMK", d_scores_BNLM, q_BNLK)
            d_values[j] += _product("BNLM,BNLK->BNMK", weights_BNLM, d_BNLK)
    narrow = [tuple(x.astype(queries[0].dtype) for x in pieces) for pieces in (d_queries, d_keys, d_values)]
    return *narrow, None


attend.defvjp(_forward, _backward)


def _product(dims: str, x: jax.Array, heads: jax.Array) -> jax.Array:
    """Returns the product in the dtype of `heads`, added up in float32 or wider."""
    wide = jnp.promote_types(heads.dtype, jnp.float32)
    return jnp.einsum(dims, x.astype(heads.dtype), heads, preferred_element_type=wide)


def _scores(q_BNLK: jax.Array, k_BNMK: jax.Array, seen_LM) -> jax.Array:
    scores_BNLM = _product("BNLK,BNMK->BNLM", q_BNLK, k_BNMK)
    return scores_BNLM if seen_LM is None else jnp.where(seen_LM, scores_BNLM, -jnp.inf)


def _with_ones(v_BNMK: jax.Array) -> jax.Array:
    """Returns the values with one column more, whose product with the weights is their sum."""
    return jnp.pad(v_BNMK, ((0, 0),) * 3 + ((0, 1),), constant_values=1)
