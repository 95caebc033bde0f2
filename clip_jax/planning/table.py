"""The plans of all configs that say for which slice they are, as the table of docs/scaling.md.

    python -m clip_jax.planning.table [--page=docs/scaling.md] [--configs=configs]

A config says so in its header: "Hardware: v5e:16x16". Without --page the table is printed; with it, it takes the
place of what is between the marks "<!-- plans -->" and "<!-- /plans -->" of that file. Minutes a large model.
"""

import re
from pathlib import Path

from absl import flags

from clip_jax import command
from clip_jax.errors import UserError, about
from clip_jax.files import whole
from clip_jax.planning import topology
from clip_jax.planning.topology import Topology

CONFIGS = flags.DEFINE_string("configs", "configs", "the folder of configs")
PAGE = flags.DEFINE_string("page", None, "a Markdown file with the two marks; None: print the table")

BEGIN, END = "<!-- plans -->", "<!-- /plans -->"


def slice_of(config: Path) -> Topology | None:
    """Returns the slice that a config's header names, or None."""
    hardware = re.search(r"^Hardware:.*?\b(v\d+[a-z]?:\d+(?:x\d+)+)", config.read_text(encoding="utf-8"), re.MULTILINE)
    with about(config):
        return hardware and topology.parse(hardware[1])


def between_marks(text: str, table: str, name: str) -> str:
    """Returns the text with the table between its marks.

    Raises:
        UserError: it has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"--page={name} has no place for the table: the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    files = sorted(Path(CONFIGS.value).glob("*.py"))
    places = {file: place for file in files if (place := slice_of(file)) is not None}
    if not places:
        raise UserError(f"--configs={CONFIGS.value}: no config there says in its header for which slice it is")
    if PAGE.value is not None:
        target = Path(PAGE.value)
        if not target.is_file():
            raise UserError(f"--page={PAGE.value}: no such file")
        between_marks(target.read_text(encoding="utf-8"), "", PAGE.value)  # refused before an hour's work, not after
    topology.prepare_environment()  # before jax is there
    import rich.console

    from clip_jax.planning.plan import make_plan
    from clip_jax.planning.report import MARKDOWN_HEAD, markdown_row, verdict

    progress, lines = rich.console.Console(stderr=True), [MARKDOWN_HEAD]
    for file, place in places.items():
        with progress.status(f"compiling {file.stem} for {place.name}"), about(file):
            plan = make_plan(command.load_config(file), place)
        progress.print(f"{file.stem}: {verdict(plan)} [compiled in {plan.compile_seconds:.0f} s]", markup=False)
        lines.append(markdown_row(plan, f"`{file.stem}`"))
    table = "\n".join(lines)
    if PAGE.value is None:
        print(table)
    else:
        text = between_marks(target.read_text(encoding="utf-8"), table, PAGE.value)
        with whole(target) as file:
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
