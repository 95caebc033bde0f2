"""A run from its config to its last checkpoint; started again in the same folder, it goes on where it was."""

import os
import socket
from typing import Any, NamedTuple

import jax
import joblib

from clip_jax import distributed, pretrained, sharding
from clip_jax.architecture import Architecture
from clip_jax.checked import leaves
from clip_jax.config import Config
from clip_jax.data.pipeline import training_pairs
from clip_jax.data.sources import Source, open_training_source
from clip_jax.errors import UserError
from clip_jax.evaluation.run import Evaluation
from clip_jax.files import place
from clip_jax.models import variants
from clip_jax.preemption import Preempted, never
from clip_jax.training.checkpoint import Checkpoints, Keep, changed_data
from clip_jax.training.evaluation import open_evaluations
from clip_jax.training.feed import Bad, Feed
from clip_jax.training.journal import Journal, every
from clip_jax.training.profiler import window
from clip_jax.training.program import Program, assemble
from clip_jax.training.sinks import check_wandb
from clip_jax.training.state import TrainState
from clip_jax.weights.bundle import Bundle
from clip_jax.workdir import Workdir


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    devices: list[jax.Device] | None = None,
    preempted: Preempted = never,
    profile: str | None = None,
) -> None:
    """Trains as the config says, into `workdir`; resumes from its latest checkpoint when there is one.

    `workdir` is a folder, or gs://BUCKET/FOLDER. When `preempted`, asked after every step, says so, it saves and
    returns. `profile` is a window of steps, "FIRST:LAST", of which a trace is written.

    Raises:
        UserError: anything about the config, the folder, the checkpoint or the data that the user can mend; a new run
            has then written nothing, an old one is as it was.
    """
    # 1. What is computed, where, and from which weights on. Everything that can be wrong is found before anything is
    # written.
    source, folder = open_training_source(config.data), Workdir(place(workdir))
    weights = pretrained.initial(config) if folder.latest_step() is None else None
    arch = _architecture(config, folder, weights)
    folder.check(config, arch)
    program = assemble(config, devices, records=len(source), arch=arch)
    tokenizer = folder.tokenizer_for(config.model, arch, weights and weights.tokenizer)
    evaluations = open_evaluations(config)
    traced = window(profile, done=folder.latest_step() or 0, total=program.steps.total) if profile else None
    check_wandb(config)
    facts = _facts(program, tokenizer, source, evaluations, folder)
    distributed.agree(facts | {"the weights to start from": weights and weights.fingerprint()})

    # 2. The folder, and in it the state: new, or as it was left.
    kernel = None if weights is None else weights.resize_kernel
    is_first = jax.process_index() == 0  # of the processes: it alone writes, but for checkpoints
    if is_first and not folder.is_claimed():
        folder.claim(config, arch, tokenizer, variant=program.variant, resize_kernel=kernel)
    with Checkpoints(folder.checkpoints, keep=_keep(config)) as checkpoints:
        latest, damaged = checkpoints.last_whole()
        start, unlogged, records = _left(checkpoints, latest, source, config)
        program, length = _as_begun(program, devices, records=records, start=start)
        last_step = program.steps.total
        state = checkpoints.restore(start, program.state) if start else _first_state(program, weights)
        del weights  # from here on the state has them
        set_aside = checkpoints.set_aside(damaged)
        if is_first:
            # Again, with what may change: the mesh, cadences, where the data lies.
            folder.claim(config, arch, variant=program.variant, resize_kernel=kernel)

        # 3. The data, from the example where the run is; and step by step.
        with (
            _feed(program, tokenizer, source, start, unlogged.get("bad_records")) as feed,
            Journal(program, folder, feed, evaluations, start=start, unlogged=unlogged, traced=traced) as journal,
        ):
            journal.begins([*_introduction(program, source, start), *length, *set_aside])
            for step in range(start + 1, last_step + 1):
                batch = journal.batch(step)
                state, metrics = program.train_step(state, batch)
                journal.dispatched(step, metrics)
                logged = journal.log(step, metrics, state)
                ends = preempted(step)
                if (
                    every(config.checkpoint_every, step, last_step)
                    or (logged and checkpoints.are_due(config.checkpoint_minutes))
                    or (journal.measured and config.keep_best)
                    or journal.problem
                    or ends
                ):
                    noted = {"records": records, "unlogged": journal.unlogged()}
                    checkpoints.save(state, _position(config, source, step) | noted, journal.measured)
                if journal.problem:
                    raise UserError(journal.problem)
                if ends:
                    journal.say(f"SIGTERM: saved at step {step}; the same command goes on from there")
                    return
            journal.ends()
            journal.say(f"trained to step {last_step}; the run is in {workdir}")


def _architecture(config: Config, folder: Workdir, weights: Bundle | None) -> Architecture:
    """Returns what the run's weights mean: as those that it starts from do, or as the config names it. A run that is
    resumed knows it by its folder."""
    if config.init_from is None:
        return variants.architecture(config.model)
    return folder.architecture() if weights is None else weights.architecture


def _first_state(program: Program, weights: Bundle | None) -> TrainState:
    """Returns the state before the first step."""
    assert (weights is None) == (program.config.init_from is None), "a run without a checkpoint has read its weights"
    return program.initial_state(None if weights is None else weights.arrays)


def _keep(config: Config) -> Keep:
    return Keep(config.keep_checkpoints, config.keep_every, config.keep_best)


class _Left(NamedTuple):
    """Where a run was left, or where it begins."""

    step: int
    unlogged: dict[str, Any]  # what was noted and not yet logged
    records: int  # of the data with which it was begun: epochs go by them


def _left(checkpoints: Checkpoints, step: int | None, source: Source, config: Config) -> _Left:
    """Returns what a step's checkpoint says of the run; None: there is none.

    Raises:
        UserError: it cannot be read, or the data is not what the run was reading, and that is not meant.
    """
    if step is None:
        return _Left(0, {}, len(source))
    position = checkpoints.position(step)
    unlogged, records = position.pop("unlogged", {}), position.pop("records", len(source))
    if _has_changed(position, _position(config, source, step), config):
        unlogged.pop("bad_window", None)  # what could not be read of the former data
    return _Left(step, unlogged, records)


def _has_changed(saved: dict[str, Any], current: dict[str, Any], config: Config) -> bool:
    """Returns whether the data is not what the run was reading.

    Raises:
        UserError: it is not, and that is not meant.
    """
    if (changed := changed_data(saved, current)) and not config.data.accept_changes:
        raise UserError(
            f"{changed}; where it lies may change (data.train, data.data_dir), what it holds may not: choose another "
            "workdir, or go on with --config.data.accept_changes=true"
        )
    return changed is not None


def _as_begun(
    program: Program, devices: list[jax.Device] | None, *, records: int, start: int
) -> tuple[Program, list[str]]:
    """Returns the program with the length that the run has had from its beginning on, when its data had so many
    records, and what is to be said of that: epochs of other data are of another length.

    Raises:
        UserError: the run is beyond its end: a checkpoint of former versions does not know the records.
    """
    config, now, said = program.config, program.steps, []
    if config.steps(records) != now:
        program = assemble(config, devices, records=records, arch=program.architecture)
        said.append(
            f"duration: {config.duration!r} stays {program.steps.total:,} steps, by the {records:,} records with which "
            f"the run was begun; by what the data has now it would be {now.total:,}"
        )
    if program.steps.total < start:
        raise UserError(
            f"nothing is left to train: duration={config.duration!r} of the data as it is now are "
            f"{program.steps.total:,} steps, and the run is at step {start:,}; go on with the former data, or begin a "
            "run with init_from=this workdir"
        )
    return program, said


def _introduction(program: Program, source: Source, start: int) -> list[str]:
    """Returns what a run says of itself before it begins."""
    lines = [*program.described(), *sharding.summary(program.state.params)]
    if program.config.init_from is not None and not start:
        lines.append(f"weights: from {program.config.init_from}")
    lines += [f"data: {len(source):,} records of {program.config.data.train}", *source.inventory().said()]
    return lines + ([f"resumed at step {start}"] if start else [])


# What each process may be told in its own way: where its host keeps the data, and how it reads them.
_OF_THE_HOST = ("data.data_dir", "data.num_threads", "data.num_workers", "model.tokenizer")


def _facts(
    program: Program, tokenizer: str | None, source: Source, evaluations: list[Evaluation], folder: Workdir
) -> dict[str, Any]:
    """Returns what has to be the same in all processes of a run."""
    return {
        "the config": {path: value for path, _, value in leaves(program.config) if path not in _OF_THE_HOST},
        "attention": program.attention,
        "the tokenizer": tokenizer,
        "the data": source.fingerprint(),
        "the data of evaluation.tasks": [one.source.fingerprint() for one in evaluations],
        "the last checkpoint": folder.latest_step(),
    }


def _position(config: Config, source: Source, step: int) -> dict[str, Any]:
    """Returns the place in the data after a step: with the config's seed, all there is to know about the order."""
    return {"examples_seen": step * config.data.global_batch, "seed": config.seed, "data": source.fingerprint()}


def _feed(program: Program, tokenizer: str | None, source: Source, start: int, bad: Bad | None) -> Feed:
    """Returns this host's batches from step `start` on; `bad` is what was not reported yet."""
    data, mesh = program.config.data, program.mesh
    rows = sharding.host_rows(data.global_batch, mesh)
    arch, last_step = program.architecture, program.steps.total
    pairs = training_pairs(program.config, arch, tokenizer, source, rows=rows, start=start, last_step=last_step)
    here = distributed.gather(socket.gethostname()).count(socket.gethostname())  # processes on this host
    cores = min(joblib.cpu_count(), max(1, os.cpu_count() // here))
    # A CPU that trains has no core to spare.
    cores = 0 if mesh.devices.flat[0].platform == "cpu" else cores
    return Feed(pairs, mesh, data, cores=cores, bad=bad if jax.process_index() == 0 else None)
