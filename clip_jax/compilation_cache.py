"""What XLA has compiled, kept for the next start of a script: JAX's persistent compilation cache, in a folder of ours.

A process that is alone has it without being asked. Of several, one writes and all have to find the same: that is for
whoever starts them, with JAX_COMPILATION_CACHE_DIR and a folder that all of them see.
"""

import platform
import time
import zlib
from pathlib import Path

from clip_jax.errors import UserError

KEPT = 30 * 24 * 3600  # seconds: what was compiled longer ago goes


def keep() -> None:
    """Lets JAX keep what takes it long to compile in ~/.cache/clip_jax/compiled, or CLIP_JAX_CACHE/compiled.

    Whoever has told JAX where, is heard; and where there is no folder to write, nothing is kept.
    """
    import jax  # not above: a process that only watches another begins without all this

    from clip_jax.weights.download import cache

    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = cache("compiled") / processor()
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if file.stat().st_mtime < time.time() - KEPT:
                file.unlink(missing_ok=True)
    except (OSError, UserError):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def processor() -> str:
    """Returns a name for this kind of processor: hosts that share a home have programs for one that others cannot
    run."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
