"""Trains a CLIP: python train.py --config=configs/quickstart.py --workdir=DIR [--config.optim.learning_rate=1e-3 …]

Run the same command again and it goes on where it was; SIGTERM makes it save and end. On several hosts, start it on
each: see docs/scaling.md.
"""

from absl import flags
from ml_collections import config_flags

from clip_jax import command, compilation_cache, distributed, supervisor
from clip_jax.files import place

CONFIG = config_flags.DEFINE_config_file("config", None, "a file in configs/, and --config.FIELD=VALUE to change it")
WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder, or gs://BUCKET/FOLDER: config, metrics, checkpoints")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX does not find it by itself")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes the run has; goes with --coordinator")
PROFILE = flags.DEFINE_string("profile", None, "FIRST:LAST steps to trace, but not a start's first, which compiles")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0 on; goes with --coordinator")


def main() -> None:
    command.require("config", "workdir")
    config, workdir = command.checked(CONFIG.value), place(WORKDIR.value)
    cluster = distributed.find(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if cluster is None:
        compilation_cache.keep()
    with supervisor.watched(cluster, workdir) as preempted:
        from clip_jax.training.loop import train  # not before: jax has to join the others first

        train(config, workdir, preempted=preempted, profile=PROFILE.value)


if __name__ == "__main__":
    command.run(main)
