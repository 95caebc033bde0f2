"""Checkpoints: parameters, optimiser and the place in the data, saved together and restored together, by Orbax.

Orbax writes in the background, under a temporary name until all is there, and keeps the latest few.
"""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from clip_jax.errors import UserError
from clip_jax.models.clip import Params
from clip_jax.sharding import path_of
from clip_jax.training.state import TrainState

# What Orbax warns of whenever OCDBT is not used, or a folder is opened only to be read: both are meant.
_MEANT = ("Skipping merge of OCDBT", "CheckpointManagerOptions.read_only=True", "Given directory is read only")
logging.getLogger("absl").addFilter(lambda record: not any(words in record.getMessage() for words in _MEANT))


class Checkpoints:
    """The checkpoints of one run: `<folder>/<step>/{params,optimizer,position}`."""

    def __init__(self, folder: Path, *, keep: int | None = None):
        """Opens the folder: to write, keeping the latest `keep`, or only to read."""

        def arrays() -> ocp.PyTreeCheckpointHandler:
            return ocp.PyTreeCheckpointHandler(use_ocdbt=False)  # a file an array: small models need no database

        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None, read_only=keep is None),
            item_handlers={"params": arrays(), "optimizer": arrays(), "position": ocp.JsonCheckpointHandler()},
        )

    def latest(self) -> int | None:
        """Returns the last step that was saved whole, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Starts writing the state and its place in the data; returns as soon as the arrays are copied."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(state.params),
                optimizer=ocp.args.PyTreeSave(state.optimizer),
                position=ocp.args.JsonSave(position),
            ),
        )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a step, every array in the place that `abstract` gives it.

        Raises:
            UserError: parameters or optimiser are not those expected; lists all that differ.
        """
        metadata = self._manager.item_metadata(step)
        _check_tree(f"{self.folder}/{step}/params", metadata.params.tree, abstract.params)
        _check_tree(f"{self.folder}/{step}/optimizer", metadata.optimizer.tree, abstract.optimizer)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(params=_restore(abstract.params), optimizer=_restore(abstract.optimizer))
        )
        counter = jax.device_put(jnp.int32(step), abstract.step.sharding)
        return TrainState(step=counter, params=restored.params, optimizer=restored.optimizer)

    def restore_params(self, step: int, abstract: Params) -> Params:
        """Returns the parameters alone, every array in the place that `abstract` gives it.

        Raises:
            UserError: the parameters are not those expected; lists all that differ.
        """
        _check_tree(f"{self.folder}/{step}/params", self._manager.item_metadata(step).params.tree, abstract)
        return self._manager.restore(step, args=ocp.args.Composite(params=_restore(abstract))).params

    def position(self, step: int) -> dict[str, Any]:
        """Returns the place in the data that was saved with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore())).position

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        """Waits until everything is on disk."""
        self._manager.close()


def check_position(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError when the data is not what the run was reading; names what differs."""
    changed = [
        f"{key}: {json.dumps(saved.get(key))} -> {json.dumps(current.get(key))}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if changed:
        raise UserError(f"the data is not what the run was reading ({'; '.join(changed)}); choose another workdir")


def _restore(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def _check_tree(where: str, stored: Any, expected: Any) -> None:
    """Raises UserError that lists every array which is missing, unexpected or of another shape."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {path_of(keys): tuple(leaf.shape) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    found, wanted = shapes(stored), shapes(expected)
    problems = [f"missing {path}" for path in wanted if path not in found]
    problems += [f"unexpected {path}" for path in found if path not in wanted]
    problems += [f"{p} has shape {found[p]}, not {wanted[p]}" for p in wanted if p in found and found[p] != wanted[p]]
    if problems:
        raise UserError(f"{where} does not fit the model: {'; '.join(problems)}")
