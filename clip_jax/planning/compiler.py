"""The TPU's compiler: a lowered program in; its sizes, its text, or by how much it is too large out."""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

from clip_jax.planning import hlo
from clip_jax.planning.topology import GiB

# How it says that a program is too large, in two generations of its words.
_REFUSALS = (
    re.compile(r"total memory required[^(]*\((?P<used>[\d.]+\w?)\) exceeds available HBM \((?P<limit>[\d.]+\w?)\)"),
    re.compile(r"Used (?P<used>[\d.]+\w?) of (?P<limit>[\d.]+\w?) hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GiB, "T": 2**40}


class TooLargeError(Exception):
    """The program needs more memory than a chip has."""

    def __init__(self, used: int, limit: int):
        super().__init__(f"{used} bytes needed, {limit} there")
        self.used = used
        self.limit = limit


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for chips that are not there."""

    text: hlo.Program
    used: int  # bytes on each chip at once
    code: int  # bytes of that which are the program itself


def compiled(lowered: Any) -> Compiled:
    """Returns the program compiled.

    Its text is taken from what the compiler writes to a folder: `Compiled.as_text` goes through the reader of another
    version, jaxlib's, which fails at what libtpu makes for chips with a SparseCore (v5p, v6e).

    Raises:
        TooLargeError: it does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="clip_jax_plan_") as folder:
        try:
            program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            raise too_large(error) from error
        (file,) = Path(folder).glob("*.after_codegen.txt")
        text = hlo.Program.of_text(file.read_text(encoding="utf-8"))
    sizes = program.memory_analysis()
    # What is given back in the place of what came in counts once.
    arrays = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    code = sizes.generated_code_size_in_bytes
    return Compiled(text, arrays + sizes.temp_size_in_bytes + code, code)


def too_large(error: jax.errors.JaxRuntimeError) -> TooLargeError:
    """Returns what the compiler's refusal says; raises the error again if it is another."""
    for words in _REFUSALS:
        if said := words.search(str(error)):
            return TooLargeError(_bytes(said["used"]), _bytes(said["limit"]))
    raise error


def _bytes(written: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)(\w?)", written).groups()
    return int(float(number) * _UNITS[unit])
