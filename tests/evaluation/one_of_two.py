"""All tasks on a small data set; as a script, one of two processes that do them together."""

import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it
import tiny

from clip_jax import sharding
from clip_jax.config import MeshConfig
from clip_jax.evaluation.on_mesh import OnMesh
from clip_jax.evaluation.tasks import TASKS, Options


def found(model: OnMesh, length: int) -> dict[str, list]:
    """Returns metrics, how many were evaluated, and what was left out, by task."""
    source = tiny.Memory(length, captions=3, damaged=(3,))
    options = Options(train=tiny.Memory(50, split="train"))
    results = {task: TASKS[task].run(model, source, options, shows=False) for task in TASKS}
    return {task: [str(result.metrics), result.evaluated, result.left_out] for task, result in results.items()}


def main(port: str, process: str, length: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    model = OnMesh.of(tiny.bundle(), sharding.make_mesh(MeshConfig()), batch_size=4)
    print(json.dumps(found(model, int(length))))


if __name__ == "__main__":
    main(*sys.argv[1:])
