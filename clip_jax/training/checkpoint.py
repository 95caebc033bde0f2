"""Checkpoints: parameters, optimiser and the place in the data, saved together and restored together, by Orbax.

Orbax writes in the background, under a temporary name until all is there, and keeps the latest few. The last that is
written before a checkpoint gets its name are the checksums of its files. In a bucket, where nothing can be renamed, it
has its name at once, and counts from when a file says that it is whole: written behind the checksums, too.
"""

import contextlib
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from clip_jax import distributed
from clip_jax.elsewhere import Elsewhere
from clip_jax.errors import UserError
from clip_jax.files import AnyPath, sizes
from clip_jax.models.clip import Weights
from clip_jax.optim import flatten, unflatten
from clip_jax.sharding import path_of
from clip_jax.training import checksums
from clip_jax.training.state import TrainState

# What Orbax warns of whenever OCDBT is not used, a folder is opened only to be read, or a state was not measured: all
# are meant.
_MEANT = (
    *("Skipping merge of OCDBT", "CheckpointManagerOptions.read_only=True", "Given directory is read only"),
    *("did not provide metrics", "Missing metrics for step"),
)
logging.getLogger("absl").addFilter(lambda record: not any(words in record.getMessage() for words in _MEANT))
# Nor its tracebacks, of errors that it raises, too, and we tell.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))

# Nor TensorStore's, of the other writes of a save, when one has failed and nobody waits for them any more.
_told = sys.unraisablehook
sys.unraisablehook = lambda found: None if "Event loop is closed" in str(found.exc_value) else _told(found)

# Devices that hold the same array write a slice each, and every slice is a program to compile: 14 s at the first save
# of the smallest model on 8 devices. Where a slice would be smaller than this, in bytes, one of them writes it all.
_MIN_SLICE = 2**20
_SHOWN = 20  # arrays of which a message says that they do not fit
_HEADER = ".zarray"  # of an array, in the array's own folder


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay."""

    latest: int  # so many
    every: int | None = None  # and those of the multiples of so many steps
    best: str | None = None  # and that one where this metric was highest


class Checkpoints:
    """The checkpoints of one run: `<folder>/<step>/{params,statistics,optimizer,ema,position}`.

    A model without batch norm has no statistics, and a run without averages no `ema`: they have no such folder.
    """

    def __init__(self, folder: AnyPath, *, keep: Keep | None = None):
        """Opens the folder: to write, or only to read.

        Raises:
            UserError: it cannot be made, or read.
        """

        def arrays() -> ocp.PyTreeCheckpointHandler:
            handler = ocp.type_handlers.ArrayHandler(
                min_slice_bytes_for_replica_parallel=_MIN_SLICE,
                enable_write_sharding_file=False,  # a run knows itself where its arrays are to lie
            )
            return ocp.PyTreeCheckpointHandler(
                use_ocdbt=False,  # a folder an array: its header says what it is
                use_compression=False,  # it costs cores that read data, and takes a thirteenth off weights
                type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, handler)),
            )

        self.folder = folder.absolute()
        self._saving: int | None = None  # the step, for Orbax does not say
        self._saved_at = time.monotonic()
        options = ocp.CheckpointManagerOptions(
            **({} if keep is None else _policy(keep)),
            cleanup_tmp_directories=keep is not None,  # of saves that a kill has cut short
            create=keep is not None,
            read_only=keep is None,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        handlers = {name: arrays() for name in ("params", "statistics", "optimizer", "ema")}
        handlers["position"] = ocp.JsonCheckpointHandler()
        with self._looking():
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """Returns the last step that was saved whole, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts writing the state and its place in the data; returns as soon as the arrays are copied. `metrics` are
        what the state was measured by."""
        ema = _some(**state.ema._asdict())
        trees = _some(params=state.params, statistics=state.statistics, optimizer=state.optimizer, ema=ema)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        with self._writing():
            self._manager.wait_until_finished()  # of the step that was saved before, its checksums too
        self._saving, self._saved_at = int(state.step), time.monotonic()
        with self._writing():
            items["position"] = ocp.args.JsonSave(position)
            self._manager.save(self._saving, args=ocp.args.Composite(**items), metrics=metrics or None)

    def are_due(self, minutes: float | None) -> bool:
        """Returns whether the last save was longer ago, by the first process's clock. All call it at the same step.

        Raises:
            UserError: the last one could not be written.
        """
        with self._writing():
            self._manager.check_for_errors()
        if minutes is None:
            return False
        return distributed.gather(time.monotonic() - self._saved_at >= 60 * minutes)[0]

    def _looking(self) -> AbstractContextManager:
        """Says what Orbax could not find out of the folder in its block."""
        return _explained(lambda why: f"the checkpoints in {self.folder} cannot be looked up ({why})")

    def _reading(self, step: int) -> AbstractContextManager:
        """Says that a step could not be read in its block: it is damaged; in a bucket, where its checksums were right,
        the network may have been at fault."""
        if isinstance(self.folder, Elsewhere):
            return _explained(lambda why: f"checkpoint {self.folder}/{step} cannot be read ({why}); start again")
        return _explained(lambda why: self._damaged(step, why))

    def _writing(self) -> AbstractContextManager:
        """Says what could not be written in its block, or in the background before, and what there is instead."""

        def explain(why: str) -> str:
            last = self.latest()
            instead = "there is none" if last is None else f"the last whole one is of step {last}"
            return (
                f"the checkpoint of step {self._saving} cannot be written to {self.folder} ({why}); {instead}; make "
                "room, or mend the folder, and start again"
            )

        return _explained(explain)

    def _write_checksums(self) -> None:
        """Called by Orbax, in one process, when all files of all processes are written and before they are a step."""
        if isinstance(self.folder, Elsewhere):
            folder = self.folder / str(self._saving)
        else:
            [folder] = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        checksums.write(folder)

    def last_whole(self) -> tuple[int | None, dict[int, str]]:
        """Returns the last step that is as it was written, and later ones with what is wrong with them.

        All processes call it, and share the reading.

        Raises:
            UserError: there are checkpoints, and not one is as it was written.
        """
        damaged: dict[int, str] = {}
        with self._looking():
            steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            share = jax.process_index(), jax.process_count()
            found = distributed.gather(checksums.damage(self.folder / str(step), share=share))
            if not any(found):
                return step, damaged
            damaged[step] = next(problem for problem in found if problem)
        if damaged:
            said = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
            raise UserError(f"all checkpoints in {self.folder} are damaged ({said}); begin anew in another workdir")
        return None, {}

    def set_aside(self, damaged: dict[int, str]) -> list[str]:
        """Takes what `last_whole` found damaged out of the way of the steps that will be written; returns what to say.

        All processes call it, and the first moves them: nothing is deleted.

        Raises:
            UserError: one cannot be moved.
        """
        lines, refused = [], None
        if jax.process_index() == 0:
            for step, problem in damaged.items():
                here, n = self.folder / str(step), 0
                while (there := self.folder.with_name("damaged") / f"{step}-{n}").exists():
                    n += 1
                lines.append(f"checkpoint {here} is damaged ({problem}); moved to {there}")
                try:
                    if not isinstance(there, Elsewhere):  # a bucket has no folders to make
                        there.parent.mkdir(exist_ok=True)
                    here.rename(there)
                except (OSError, UserError) as error:
                    refused = f"checkpoint {here} is damaged ({problem}) and cannot be moved to {there}: {error}"
                    break
        if damaged:
            if refused := distributed.gather(refused)[0]:
                raise UserError(refused)
            with self._looking():
                self._manager.reload()
        return lines

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a step that `last_whole` gave, every array in the place that `abstract` gives it.

        Raises:
            UserError: damaged all the same, or parameters or optimiser are not those expected; lists all that differ.
        """
        restored = self._restore(
            step,
            params=abstract.params,
            statistics=abstract.statistics,
            optimizer=abstract.optimizer,
            ema=_some(**abstract.ema._asdict()),
        )
        restored["ema"] = abstract.ema._replace(**restored["ema"])
        return TrainState(step=jax.device_put(jnp.int32(step), abstract.step.sharding), **restored)

    def restore_weights(self, step: int, abstract: Weights) -> Weights:
        """Returns the weights alone, moving averages where there are any, each in the place that `abstract` gives it.

        Raises:
            UserError: no such step, damaged, or the weights are not those expected; lists what differs.
        """
        if step not in (steps := self._manager.all_steps()):
            raise UserError(f"{self.folder} has no checkpoint {step}; there are: {', '.join(map(str, sorted(steps)))}")
        if problem := checksums.damage(self.folder / str(step), ("params", "statistics", "ema")):
            raise UserError(self._damaged(step, problem))
        trees = {"params": abstract.params, "statistics": abstract.statistics}
        averaged = {_path(name) for name in _headers(self.folder / str(step) / "ema")}
        ema = unflatten({path: x for path, x in flatten(trees).items() if path in averaged})
        restored = self._restore(step, **trees, ema=ema)
        averages = flatten(restored.pop("ema"))
        return Weights(**(trees | unflatten(flatten(restored) | averages)))

    def _restore(self, step: int, **trees: Any) -> dict[str, Any]:
        """Returns the named items, each in the shapes and places of its tree."""
        present = _some(**trees)
        for name, tree in present.items():
            _check_tree(self.folder / str(step) / name, tree)
        items = {
            name: ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in present.items()
        }
        with self._reading(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return trees | {name: restored[name] for name in present}

    def _damaged(self, step: int, problem: str) -> str:
        return f"checkpoint {self.folder}/{step} is damaged ({problem}); remove it to go on from the one before"

    def position(self, step: int) -> dict[str, Any]:
        """Returns the place in the data that was saved with a step."""
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore())).position

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        """Waits until everything is on disk."""
        with self._writing():
            self._manager.close()


def _policy(keep: Keep) -> dict[str, Any]:
    """Returns what Orbax is told of the checkpoints that stay."""
    policies = ocp.checkpoint_managers.preservation_policy
    kept = [policies.LatestN(keep.latest)]
    if keep.every is not None:
        kept.append(policies.EveryNSteps(keep.every))
    if keep.best is None:
        return {"preservation_policy": policies.AnyPreservationPolicy(kept)}

    def value(metrics: dict[str, float]) -> float:
        return metrics.get(keep.best, -math.inf)  # not there: it could not be measured, or was not yet asked for

    kept.append(policies.BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False))
    # With a best_fn metrics are written beside the arrays: a run that goes on knows which was best.
    return {"preservation_policy": policies.AnyPreservationPolicy(kept), "best_fn": value}


@contextlib.contextmanager
def _explained(explain: Callable[[str], str]) -> Iterator[None]:
    """Makes a UserError of whatever Orbax raises in its block, by its first line, unless another process has died."""
    try:
        yield
    except Exception as error:
        if distributed.is_of_another(error):
            raise
        raise UserError(explain(str(error).split("\n")[0] or type(error).__name__)) from error


def _some(**trees: Any) -> dict[str, Any]:
    """Returns the trees that hold an array: Orbax takes no empty one."""
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def changed_data(saved: dict[str, Any], current: dict[str, Any], *, shown: int = 10) -> str | None:
    """Returns in what the data is not what the run was reading, in words; None: in nothing."""
    was, now = dict(_leaves(saved)), dict(_leaves(current))
    changed = [
        f"{key}: {json.dumps(was.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if not changed:
        return None
    more = f"; and {len(changed) - shown:,} more" if len(changed) > shown else ""
    return f"the data is not what the run was reading ({'; '.join(changed[:shown])}{more})"


def _leaves(tree: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{at}{key}/")
        else:
            yield f"{at}{key}", value


def _check_tree(folder: AnyPath, tree: Any) -> None:
    """Raises UserError that lists the arrays which are missing, unexpected, or of another type or shape."""
    wanted = {
        path_of(keys): _description(leaf.dtype, leaf.shape) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    headers = _headers(folder)
    with checksums.threads() as pool:
        stored = pool.map(lambda name: _stored(folder / name), headers)
        found = dict(zip(map(_path, headers), stored, strict=True))
    problems = [f"missing {path}" for path in wanted if path not in found]
    problems += [f"unexpected {path}" for path in found if path not in wanted]
    problems += [f"{p} is {found[p]}, not {wanted[p]}" for p in wanted if p in found and found[p] != wanted[p]]
    if problems:
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise UserError(
            f"{folder} is not what this run would have saved: {'; '.join(problems[:_SHOWN])}{more}; if another version "
            "of clip_jax has written it, go on with that one, or begin anew with init_from set to this run's folder"
        )


def _headers(folder: AnyPath) -> list[str]:
    """Returns the headers of an item's arrays, each by its place in the item's folder."""
    return [name for name in sizes(folder) if name.endswith(f"/{_HEADER}")]


def _path(header: str) -> str:
    """Returns the path of an array in its tree, by its header's place."""
    return header.removesuffix(f"/{_HEADER}").replace(".", "/")


def _stored(array: AnyPath) -> str:
    """Returns what an array's own header says it is."""
    try:
        header = json.loads(array.read_text())
        return _description(header["dtype"], header["shape"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable ({error})"


def _description(dtype: Any, shape: Any) -> str:
    return f"{np.dtype(dtype)} {tuple(shape)}"
