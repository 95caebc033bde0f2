"""Plans a run on a slice of TPUs that is not there: memory, collectives and speed, by the TPU's own compiler.

    python -m clip_jax.planning --config=configs/FILE.py --topology=v5e:16x16 [--config.FIELD=VALUE …] [--find_batch]

Runs on any Linux x86-64 machine with libtpu. A large model takes minutes to compile.
"""

import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from clip_jax import command
from clip_jax.config import Config
from clip_jax.planning import topology

CONFIG = config_flags.DEFINE_config_file("config", None, "a file in configs/, and --config.FIELD=VALUE to change it")
TOPOLOGY = flags.DEFINE_string("topology", None, "a slice: v5e:16x16, v6e:8x8, v4:4x4x8, v5p:8x8x8, …")
FIND_BATCH = flags.DEFINE_bool("find_batch", False, "search the largest batch that fits (several compilations)")
REMEDIES = flags.DEFINE_bool("remedies", True, "when it does not fit, try what could help (several compilations)")
JSON = flags.DEFINE_bool("json", False, "print one JSON object instead of tables")


def main() -> None:
    command.require("config", "topology")
    place, config = topology.parse(TOPOLOGY.value), command.checked(CONFIG.value)
    topology.prepare_environment()  # before jax is there
    import rich.console

    from clip_jax.planning import report, search
    from clip_jax.planning.plan import Plan, make_plan

    progress = rich.console.Console(stderr=True)
    tables = rich.console.Console(quiet=JSON.value)

    def make(config: Config) -> Plan:
        words = f"{config.model.variant or config.init_from}, batch {config.data.global_batch:,}, for {place.name}"
        with progress.status(f"compiling {words} (a large model takes minutes)"):
            plan = make_plan(config, place)
        progress.print(f"{words}: {report.verdict(plan)} [compiled in {plan.compile_seconds:.0f} s]", markup=False)
        return plan

    plan = make(config)
    report.show(plan, tables)
    tried, batches, best = [], [], None
    if FIND_BATCH.value:
        batches = list(search.find_batch(config, plan, make))
        best = search.largest(batches)
        _say_batch(best, plan, tables, report.show)
    elif not plan.fits and REMEDIES.value:
        tried = list(search.remedies(config, plan, make))
        _say_remedies(tried, tables, report.show)
    if JSON.value:
        sys.stdout.write(report.as_json(plan, tried, batches, best) + "\n")


def _say_batch(best, first, console, show: Callable) -> None:
    if best is None:
        console.print("no batch fits: leave --find_batch out to see what could help")
        return
    console.print(f"the largest batch that fits: {best.global_batch:,} ({best.rows:,} a place on the batch axes)")
    if best is not first:
        show(best, console)


def _say_remedies(tried: list, console, show: Callable) -> None:
    if tried and tried[-1].plan.fits:
        console.print(f"it fits with {tried[-1].flags()}", markup=False, soft_wrap=True)
        show(tried[-1].plan, console)
    elif tried:
        console.print(f"tried, and still too large: {tried[-1].flags()}; take more chips, or larger ones", markup=False)
    else:
        console.print("nothing to try: parameters and optimiser alone are too large; take more chips, or larger ones")


if __name__ == "__main__":
    command.run(main)
