"""Where the scalars of `metrics.jsonl` go besides, for people who look rather than read: TensorBoard, and Weights &
Biases where the config asks for it."""

import contextlib
import dataclasses
import importlib.util
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax

from clip_jax.config import Config
from clip_jax.elsewhere import Elsewhere
from clip_jax.errors import UserError
from clip_jax.files import read_text, write_text
from clip_jax.training.growing import growing
from clip_jax.workdir import Workdir


class TensorBoard:
    """WORKDIR/tensorboard.

    Not by tensorboardX' SummaryWriter: its thread dies of a full disk, and then a run would wait for it for ever. Nor
    by its EventsWriter, which writes to a bucket by a client of its own.
    """

    said = None  # when a run begins

    def __init__(self, workdir: Workdir, *, resumed_at: int):
        self._parts = _tensorboard()
        self._file = growing(workdir.tensorboard / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}")
        self._write(file_version="brain.Event:2")
        # It hides what a former process had logged from there on.
        self._write(step=resumed_at + 1, session_log={"status": "START"})

    def write(self, step: int, scalars: dict[str, int | float]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in scalars.items()]
        self._write(step=step, summary={"value": values})

    def _write(self, **event: Any) -> None:
        event = self._parts.event_file_writer.event_pb2.Event(wall_time=time.time(), **event).SerializeToString()
        length = struct.pack("<Q", len(event))  # a TFRecord: each of the two with its checksum
        self._file.write(length + self._checksum(length) + event + self._checksum(event))

    def flush(self) -> None:
        self._file.flush()

    def _checksum(self, data: bytes) -> bytes:
        return struct.pack("<I", self._parts.record_writer.masked_crc32c(data))

    def close(self, *, failed: bool) -> None:
        self._file.close()


def _tensorboard() -> ModuleType:
    """Returns tensorboardX, imported without PyTorch, which it would take along wherever that is installed."""
    if hidden := "torch" not in sys.modules:
        sys.modules["torch"] = None
    try:
        import tensorboardX.event_file_writer
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX


# --- Weights & Biases -----------------------------------------------------------------------------------------------


def check_wandb(config: Config) -> None:
    """Raises UserError, before a run has written anything, where Weights & Biases is asked for and could not be used.

    Where there is a terminal, it is asked for the key. Only the process that writes needs any of it.
    """
    if config.wandb is None or jax.process_index():
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # no origin: a folder of that name, such as its runs leave behind
        raise UserError(
            f"wandb={config.wandb!r}: Weights & Biases is not installed; pip install wandb, or set wandb=none"
        )
    import wandb

    if wandb.setup().settings.mode == "online":
        with _refusals(config):
            wandb.login(verify=False)


class WeightsAndBiases:
    """A run of the project that the config names. Its id lies in the workdir, so that a resumed run goes on in it.

    Steps that a killed run had logged behind its last checkpoint are logged again: curves go by "step", a value of
    their own, and lie on themselves there. Weights & Biases' own counter only ever grows, and would refuse them.
    """

    def __init__(self, workdir: Workdir, config: Config):
        import wandb

        if not workdir.wandb_id.exists():
            write_text(workdir.wandb_id, secrets.token_hex(8) + "\n")
        here = None if isinstance(workdir.path, Elsewhere) else os.fspath(workdir.path)  # None: where it chooses to
        with _refusals(config):
            self._run = wandb.init(
                project=config.wandb,
                id=read_text(workdir.wandb_id).strip(),
                name=workdir.path.resolve().name,
                dir=here,  # it makes its folder `wandb` in it
                config=dataclasses.asdict(config),
                allow_val_change=True,  # as the mesh, when a run goes on elsewhere
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),  # the screen is ours
            )
        self._run.define_metric("*", step_metric="step")
        settings = self._run.settings
        where = self._run.url if settings.mode == "online" else settings.mode
        later = f"; `wandb sync {settings.sync_dir}` sends it" if settings.mode == "offline" else ""
        files = "" if here else f"; its files are in {settings.sync_dir}"
        self.said = f"Weights & Biases: {where}{later}{files}"

    def write(self, step: int, scalars: dict[str, int | float]) -> None:
        self._run.log({"step": step, **scalars})

    def flush(self) -> None:
        """Nothing: it sends by itself."""

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@contextlib.contextmanager
def _refusals(config: Config) -> Iterator[None]:
    """Turns what Weights & Biases refuses, or cannot reach, into a UserError."""
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb={config.wandb!r}: {' '.join(str(error).split())} With WANDB_MODE=offline in the environment the "
            "run is kept in the workdir, to be sent later; with wandb=none it goes on without"
        ) from error


Sink = TensorBoard | WeightsAndBiases


def sinks(workdir: Workdir, config: Config, *, resumed_at: int) -> list[Sink]:
    """Returns where a run's scalars go.

    Raises:
        UserError: Weights & Biases refuses.
    """
    board = TensorBoard(workdir, resumed_at=resumed_at)
    return [board] if config.wandb is None else [board, WeightsAndBiases(workdir, config)]
