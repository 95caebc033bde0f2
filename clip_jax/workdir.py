"""A run's folder: what lies where, and the `config.json` that says whose run it is.

WORKDIR/config.json           the whole run ("config"), and what its weights mean ("variant", "architecture", "lora",
                              "resize_kernel")
WORKDIR/tokenizer.json        the tokenizer, where it is not CLIP's own
WORKDIR/metrics.jsonl         one JSON object a logged step
WORKDIR/incidents.jsonl       one JSON object for every update that was skipped and every loss that jumped
WORKDIR/checkpoints/<step>/   Orbax
WORKDIR/damaged/              checkpoints that were not as they were written, when the run was started again
WORKDIR/eval/<step>/*.json    results, and the pictures beside them
WORKDIR/tensorboard/          the scalars of metrics.jsonl
WORKDIR/wandb/                Weights & Biases' files, and the run's id there
WORKDIR/profile/              traces of --profile
WORKDIR/curves.png            the curves that `python -m clip_jax.training.report` draws
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from clip_jax.architecture import Architecture, Lora, ResNetTower
from clip_jax.checked import build
from clip_jax.config import FREE_ON_RESUME, Config, ModelConfig, differences
from clip_jax.elsewhere import Elsewhere
from clip_jax.errors import UserError
from clip_jax.files import AnyPath, children, read_text, write_text
from clip_jax.tokenizer.file import FILE_NAME, FileTokenizer

CHECKPOINTS = "checkpoints"  # the folder of them
COMMITTED = "commit_success.txt"  # what Orbax writes last into a checkpoint


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The paths of one run."""

    path: AnyPath

    @property
    def config_file(self) -> AnyPath:
        return self.path / "config.json"

    @property
    def tokenizer_file(self) -> AnyPath:
        return self.path / FILE_NAME

    @property
    def metrics_file(self) -> AnyPath:
        return self.path / "metrics.jsonl"

    @property
    def incidents_file(self) -> AnyPath:
        return self.path / "incidents.jsonl"

    @property
    def checkpoints(self) -> AnyPath:
        return self.path / CHECKPOINTS

    @property
    def tensorboard(self) -> AnyPath:
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> AnyPath:
        return self.path / "wandb" / "id"

    @property
    def profile(self) -> AnyPath:
        return self.path / "profile"

    @property
    def curves(self) -> AnyPath:
        return self.path / "curves.png"

    def evaluations(self) -> dict[int, list[AnyPath]]:
        """Returns the files of results, by step."""
        folders = {int(path.name): path for path in children(self.path / "eval") if path.name.isdecimal()}
        return {
            step: sorted(path for path in children(folder) if path.suffix == ".json")
            for step, folder in sorted(folders.items())
        }

    def evaluation(self, step: int) -> AnyPath:
        return self.path / "eval" / str(step)

    def latest_step(self) -> int | None:
        """Returns the step of the last checkpoint, by its folder's name, which an unfinished one does not have; in a
        bucket that has it, too, but not yet the file that says that it is whole.
        """
        if not self.is_claimed():
            return None
        steps = sorted((int(path.name) for path in children(self.checkpoints) if path.name.isdecimal()), reverse=True)
        if isinstance(self.checkpoints, Elsewhere):
            return next((step for step in steps if (self.checkpoints / str(step) / COMMITTED).exists()), None)
        return steps[0] if steps else None

    def config(self) -> Config:
        """Returns the run's config.

        Raises:
            UserError: there is none, or it is not one of ours.
        """
        return self._built(Config, "config")

    def architecture(self) -> Architecture:
        """Returns what the run's weights mean; needs nothing of the config, which may be of another version.

        Raises:
            UserError: there is none, or it is not one of ours.
        """
        return self._built(Architecture, "architecture")

    def lora(self) -> Lora | None:
        """Returns what the adapters of the run's weights mean; None: they have none.

        Raises:
            UserError: there are some, and what they are is not one of ours.
        """
        return self._built(Lora, "lora") if "lora" in self._content() else None

    def check(self, config: Config, architecture: Architecture) -> None:
        """Raises UserError when the folder belongs to another run; names the fields that differ."""
        if not self.is_claimed():
            return
        before = self.config()
        changed = differences(before, config)
        if isinstance(architecture.image, ResNetTower) and before.microbatch != config.microbatch:
            changed.append(f"microbatch, of which batch norm sees each: {before.microbatch} -> {config.microbatch}")
        if not changed and self.architecture() != architecture:
            what = config.init_from or config.model.variant
            changed = [f"architecture of {what}: {self.architecture()} -> {architecture}"]
        if changed:
            raise UserError(
                f"{self.path} belongs to another config ({'; '.join(changed)}); choose another workdir. What may "
                f"change when a run goes on: {', '.join(FREE_ON_RESUME)}"
            )

    def is_claimed(self) -> bool:
        """Returns whether the folder is some run's."""
        if isinstance(self.config_file, Elsewhere):
            return self.config_file.exists()
        return os.path.exists(self.config_file)  # noqa: PTH110 (a name that is too long is an error for Path.exists)

    def claim(
        self,
        config: Config,
        architecture: Architecture,
        tokenizer: str | None = None,
        *,
        variant: str | None = None,
        resize_kernel: str | None = None,
    ) -> None:
        """Makes the folder this run's; `tokenizer` is what its tokenizer.json says, if the run has one, `variant` its
        architecture's name, where the config gives none, and `resize_kernel` that of the weights it starts from; None:
        what it has said before.

        Raises:
            UserError: it cannot be written.
        """
        content = {
            "variant": variant or config.model.variant,
            "config": dataclasses.asdict(config),
            "architecture": dataclasses.asdict(architecture),
        }
        if config.model.lora is not None:
            content["lora"] = dataclasses.asdict(config.model.lora)
        if kernel := resize_kernel or (self.resize_kernel() if self.is_claimed() else None):
            content["resize_kernel"] = kernel
        if tokenizer is not None:
            write_text(self.tokenizer_file, tokenizer)
        write_text(self.config_file, json.dumps(content, indent=2) + "\n")

    def tokenizer(self) -> str | None:
        """Returns what the run's tokenizer.json says; None: it has none.

        Raises:
            UserError: it cannot be read.
        """
        return read_text(self.tokenizer_file) if self.tokenizer_file.exists() else None

    def tokenizer_for(self, model: ModelConfig, architecture: Architecture, came: str | None = None) -> str | None:
        """Returns what the tokenizer.json says that a run has to use; None: its tokenizer is CLIP's own. `came` is that
        of the weights that a new run starts from.

        Raises:
            UserError: the config names none, or one that does not go with the architecture, the weights or this run.
        """
        kept, whose = came, "init_from's weights"
        if self.is_claimed():
            kept, whose = self.tokenizer(), f"this run, {self.tokenizer_file}"
        name = model.variant or "the model"
        if architecture.tokenize.kind == "clip":
            if model.tokenizer is not None:
                raise UserError(f"{model.tokenizer=}: {name} has CLIP's own tokenizer; leave it out")
            return None
        if model.tokenizer is None and kept is None:
            raise UserError(f"{name} has its tokenizer in a file: set model.tokenizer to its {FILE_NAME}")
        text = kept if model.tokenizer is None else read_text(Path(model.tokenizer))
        if kept is not None and text != kept:
            raise UserError(f"{model.tokenizer=} is not the tokenizer of {whose}; leave it out")
        size, room = FileTokenizer(text, architecture.tokenize).vocab_size, architecture.text.vocab_size
        if size > room:
            raise UserError(f"the tokenizer has {size} ids, and {name} an embedding for {room} only")
        return text

    def variant(self) -> str:
        """Returns the name of the run's architecture."""
        return str(self._read("variant"))

    def resize_kernel(self) -> str | None:
        """Returns by which kernel the weights that the run started from are resized; None: it does not say."""
        return self._content().get("resize_kernel")

    def _built(self, cls: type, part: str):
        values = self._read(part)
        if not isinstance(values, dict):
            raise UserError(f"{self.config_file}: {part!r} should be an object")
        try:
            return build(cls, values)
        except UserError as error:
            raise UserError(f"{self.config_file}: {part}: {error}") from error

    def _read(self, part: str):
        content = self._content()
        if part not in content:
            raise UserError(f"{self.config_file} should be an object with {part!r}")
        return content[part]

    def _content(self) -> dict[str, Any]:
        """Returns what config.json says; nothing, where it is no object."""
        try:
            content = json.loads(self.config_file.read_text(encoding="utf-8"))
        except UserError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is not a run's folder: its config.json: {error}") from error
        return content if isinstance(content, dict) else {}
