"""Data sets that ship with the package as TFDS builders: they go down the same road as any other TFDS data set.

They write ArrayRecord and need neither TensorFlow nor a network.
"""

import importlib

# name → the module whose import registers the builder with TFDS
EMBEDDED = {
    "captioned_digits": "clip_jax.data.embedded.digits",
    "captioned_shapes": "clip_jax.data.embedded.shapes",
}


def register(name: str) -> None:
    """Makes an embedded data set known to TFDS under its name."""
    importlib.import_module(EMBEDDED[name])
