"""Array types and THE dimension legend: every suffix and every jaxtyping letter in this package is one of these.

    B pairs in the global batch    b pairs on this host          H W C image
    P patches                      L sequence                    M attended-to sequence
    D tower width                  F MLP width                   N heads
    K head width                   E joint embedding             V vocabulary
    A texts, where they are not as many as images                T queries, keys and values: 3

Names carry shapes where shapes change: `q_BLNK` has the dimensions B, L, N and K; einsum letters are the same.
jaxtyping is only needed where shapes are checked, which is in the tests: without it the signatures are words.
"""

from typing import TYPE_CHECKING, NamedTuple

try:
    from jaxtyping import Bool, Float, Int, UInt8
except ImportError:
    if not TYPE_CHECKING:

        class _Unchecked:
            """Stands for any array where jaxtyping is not installed."""

            def __class_getitem__(cls, _):
                return cls

        Bool = Float = Int = UInt8 = _Unchecked

import numpy as np

__all__ = ["Batch", "Bool", "Float", "Int", "UInt8"]


class Batch(NamedTuple):
    """Image-text pairs: of one host when NumPy, of the whole mesh when JAX arrays (a pytree either way)."""

    image: np.ndarray  # uint8 [b H W C]: normalised on the device, a quarter of the bytes on the way there
    tokens: np.ndarray  # int32 [b L], 0 after the EOT
    valid: np.ndarray  # bool [b]: False for padding and for records that could not be read
