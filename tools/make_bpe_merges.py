"""Makes clip_jax/assets/clip_bpe_merges.txt.gz: the merge table of CLIP's tokenizer, as OpenAI published it.

    pip install --no-deps clip-anytorch && python tools/make_bpe_merges.py

OpenAI's file holds 262,144 merges, of which CLIP uses the first 48,894: those are kept, in their order, which
is their rank. The bytes written depend on nothing but that file (and zlib), so running it again changes nothing.
"""

import gzip
import importlib.util
from pathlib import Path

ASSET = Path(__file__).resolve().parents[1] / "clip_jax" / "assets" / "clip_bpe_merges.txt.gz"
NUM_MERGES = 49_408 - 2 * 256 - 2  # the vocabulary, less the bytes (inside a word and ending one) and two specials
HEADER = (
    f"CLIP's byte-pair merges, best first: the first {NUM_MERGES:,} of bpe_simple_vocab_16e6.txt.gz in "
    "https://github.com/openai/CLIP, MIT License, Copyright (c) 2021 OpenAI (see README.md beside this file)"
)


def published_table() -> Path:
    """Returns the path of OpenAI's file inside the installed `clip` package, which is not imported: it wants torch."""
    spec = importlib.util.find_spec("clip")
    if spec is None or spec.origin is None:
        raise SystemExit("the reference package is absent: pip install --no-deps clip-anytorch")
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


def used_merges(table: str) -> list[str]:
    """Returns the merges CLIP uses, one "left right" each; raises ValueError if this is not the table we know."""
    merges = table.split("\n")[1:][:NUM_MERGES]  # the first line is the table's version
    if len(merges) != NUM_MERGES or any(merge.count(" ") != 1 for merge in merges):
        raise ValueError(f"expected a version line, then at least {NUM_MERGES:,} lines of two symbols each")
    return merges


def write(merges: list[str], target: Path) -> None:
    """Writes under a temporary name first, so that an interrupted run leaves no half table behind."""
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as zipped:
        zipped.write("\n".join([HEADER, *merges, ""]).encode())
    temporary.replace(target)


def main() -> None:
    """Reads, selects, writes, and says what it wrote."""
    merges = used_merges(gzip.decompress(published_table().read_bytes()).decode())
    write(merges, ASSET)
    print(f"{ASSET}: {len(merges):,} merges, {ASSET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
