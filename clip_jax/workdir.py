"""A run's folder: what lies where, and the `config.json` that says whose run it is.

WORKDIR/config.json           {"config": the whole run, "architecture": what the weights mean}
WORKDIR/metrics.jsonl         one JSON object a logged step
WORKDIR/checkpoints/<step>/   Orbax
WORKDIR/eval/<step>/*.json    results, and the pictures beside them
WORKDIR/tensorboard/          the scalars of metrics.jsonl
"""

import dataclasses
import json
import os
from pathlib import Path

from clip_jax.config import Config, build, differences
from clip_jax.errors import UserError
from clip_jax.files import write_text
from clip_jax.models.variants import Architecture


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The paths of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def evaluation(self, step: int) -> Path:
        return self.path / "eval" / str(step)

    def read(self) -> tuple[Config, Architecture]:
        """Returns what `config.json` says of the run.

        Raises:
            UserError: there is none, or it is not one of ours.
        """
        try:
            content = json.loads(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is not a run's folder: its config.json: {error}") from error
        parts = [content.get(key) if isinstance(content, dict) else None for key in ("config", "architecture")]
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f'{self.config_file} should be an object with "config" and "architecture"')
        try:
            return build(Config, parts[0]), build(Architecture, parts[1])
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from error

    def claim(self, config: Config, architecture: Architecture) -> None:
        """Makes the folder this run's: writes `config.json`, unless it is there and belongs to another run.

        Raises:
            UserError: another run's folder (names the fields that differ), or one that cannot be written.
        """
        if os.path.exists(self.config_file):  # noqa: PTH110 (a name that is too long is an error for Path.exists)
            old_config, old_architecture = self.read()
            changed = differences(old_config, config)
            if not changed and old_architecture != architecture:
                changed = [f"architecture of {config.model.variant}: {old_architecture} -> {architecture}"]
            if changed:
                raise UserError(f"{self.path} belongs to another config ({'; '.join(changed)}); choose another workdir")
        content = {"config": dataclasses.asdict(config), "architecture": dataclasses.asdict(architecture)}
        write_text(self.config_file, json.dumps(content, indent=2) + "\n")
