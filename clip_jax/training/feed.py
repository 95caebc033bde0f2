"""Global batches, on the mesh before the step asks for them; and what there is to say of the way there: what could not
be read, and whether the step had to wait."""

import collections
import dataclasses
import gc
import math
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from clip_jax import distributed, sharding
from clip_jax.config import DataConfig
from clip_jax.data.pipeline import HostBatch, TrainingPairs, training_batches
from clip_jax.data.problems import Problem
from clip_jax.errors import UserError
from clip_jax.typing import Batch

STARVED = 0.1  # share of the time that steps may wait for data before something is done about it
MARGIN = 1.2  # workers, for each that would just do
WINDOW = 10_000  # pairs, of which only so many may be bad
SHOWN = 5  # shards that are named
LOGGED = 100  # shards that a line of metrics.jsonl names at most

Bad = dict[str, dict[str, int]]  # how many records of a shard, by the words of their problem


class Feed:
    """This host's part of the batches from some step on, each on its devices while the step before is computed."""

    def __init__(self, pairs: TrainingPairs, mesh: Mesh, data: DataConfig, *, cores: int, bad: Bad | None = None):
        """`cores` may be used by workers, where the config leaves their number open; `bad` is what was `unreported`
        when the run was interrupted."""
        self._pairs, self._mesh, self._threads = pairs, mesh, data.num_threads
        self._workers, self._cores = data.num_workers or 0, cores if data.num_workers is None else 0
        self._steps = 0
        self._bad: Bad = bad or {}
        self._settled = self._warned = False
        self._batches = self._opened()

    def _opened(self) -> grain.DatasetIterator:
        first = self._pairs.first + self._steps * self._pairs.global_batch
        pairs = dataclasses.replace(self._pairs, first=first)
        host = training_batches(pairs, num_threads=self._threads, num_workers=self._workers)
        # One lies on the devices, another is on its way there, while a step goes on.
        return iter(grain.experimental.ThreadPrefetchIterDataset(host.map(self._placed), prefetch_buffer_size=1))

    def _placed(self, loaded: HostBatch) -> HostBatch:
        return loaded._replace(batch=sharding.to_mesh(loaded.batch, self._pairs.global_batch, self._mesh))

    def __next__(self) -> Batch:
        """Returns the next global batch.

        Raises:
            UserError: a process that reads for it has died.
        """
        try:
            loaded = next(self._batches)
        except RuntimeError as error:
            if "Worker process" not in str(error):
                raise
            raise UserError(
                f"a worker process that reads data has died ({' '.join(str(error).split())}); when memory ran out, "
                f"lower data.num_workers={self._workers}; start again to go on from the last checkpoint"
            ) from error
        self._steps += 1
        for row in np.flatnonzero(loaded.problem):
            reasons = self._bad.setdefault(self._pairs.source.shard_of(int(loaded.index[row])), {})
            words = Problem(loaded.problem[row]).words
            reasons[words] = reasons.get(words, 0) + 1
        return loaded.batch

    def records(self, step: int) -> dict[str, list[int]]:
        """Returns the records of a step's global batch, by shard; they are computed anew, the order knows them."""
        shards: dict[str, list[int]] = {}
        batch = self._pairs.global_batch
        for position in range((step - 1) * batch, step * batch):
            _, index = self._pairs.order[position]
            shards.setdefault(self._pairs.source.shard_of(index), []).append(index)
        return shards

    def unreported(self) -> Bad:
        """Returns what all processes could not read since the last report. All call it at the same step."""
        return merged(distributed.gather(self._bad))

    def report(self, waited: float, say: Callable[[str], None]) -> tuple[float, Bad]:
        """Returns of all processes the longest wait, as a share of their time, and what they could not read since the
        last report. All call it at the same step; what one of them does about its wait, or should do, is said."""
        bad, self._bad = self._bad, {}
        reports = distributed.gather({"waited": waited, "bad": bad, "help": self._help(waited)})
        for process, report in enumerate(reports):
            if report["help"]:
                say(f"process {process}: {report['help']}" if len(reports) > 1 else report["help"])
        return max(report["waited"] for report in reports), merged([report["bad"] for report in reports])

    def _help(self, waited: float) -> str | None:
        """Returns what is done, or should be done, about the share of the time that steps wait for data."""
        settled, self._settled = self._settled, True
        if waited <= STARVED or not settled:  # at first compilation, and the first worker's start, count too
            return None
        words = f"steps wait {waited:.0%} of their time for data"
        if self._workers < self._cores:
            needed = max(self._workers + 1, math.ceil(max(self._workers, 1) * MARGIN / max(1 - waited, 0.01)))
            self._workers, self._settled = min(needed, self._cores), False
            self._batches.close()
            self._batches = self._opened()
            return f"{words}: data is read by {self._workers} worker processes from now on"
        if self._warned:
            return None
        self._warned = True
        return (
            f"{words}: raise data.num_workers (now {self._workers}) or data.num_threads (now {self._threads}) while "
            "there are cores left, or make the images in the shards smaller; `python -m clip_jax.data` measures them"
        )

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *error) -> None:
        self._batches.close()
        del self._batches
        gc.collect()  # Grain's iterators hold each other, and memory that is shared with workers


def merged(several: list[Bad]) -> Bad:
    """Returns what all processes could not read, the worst shard first, then by name: in whatever order it came."""
    together: dict[str, collections.Counter[str]] = {}
    for bad in several:
        for shard, reasons in bad.items():
            together.setdefault(shard, collections.Counter()).update(reasons)
    worst = sorted(together, key=lambda shard: (-together[shard].total(), shard))
    return {shard: dict(sorted(together[shard].items(), key=lambda reason: (-reason[1], reason[0]))) for shard in worst}


def total(bad: Bad) -> int:
    return sum(sum(reasons.values()) for reasons in bad.values())


def in_words(bad: Bad) -> str:
    """Returns "12 pairs: damaged image 9, no caption 3; most of them in 00017.tar (8), …"."""
    reasons: collections.Counter[str] = collections.Counter()
    for words in bad.values():
        reasons.update(words)
    worst = [f"{shard} ({sum(words.values()):,})" for shard, words in merged([bad]).items()]
    shown = ", ".join(worst[:SHOWN]) + (" …" if len(worst) > SHOWN else "")
    return f"{total(bad):,} pairs: {', '.join(f'{words} {n:,}' for words, n in reasons.most_common())}; in {shown}"


class BadLimit:
    """Notices when too many of the last pairs could not be read."""

    def __init__(self, limit: float, *, seen: int, state: dict[str, Any] | None = None):
        """Goes on from what `state` gave; without one it begins after so many pairs `seen`."""
        state = state or {"seen": seen, "laps": []}
        self._limit = limit
        self._seen: int = state["seen"]
        self._laps: collections.deque[tuple[int, Bad]] = collections.deque((pairs, bad) for pairs, bad in state["laps"])

    def passed(self, seen: int, bad: Bad) -> str | None:
        """Returns what is to be said, with the worst shards, when the limit is passed; `bad` is of the pairs seen since
        the last call."""
        self._laps.append((seen - self._seen, bad))
        self._seen = seen
        while sum(pairs for pairs, _ in self._laps) - self._laps[0][0] >= WINDOW:
            self._laps.popleft()
        window = max(WINDOW, sum(pairs for pairs, _ in self._laps))
        recent = merged([lap for _, lap in self._laps])
        if total(recent) <= self._limit * window:
            return None
        return (
            f"more than {100 * self._limit:.3g}% (data.bad_limit) of the last {window:,} pairs cannot be read; left "
            f"out: {in_words(recent)}; mend or remove these and go on with data.accept_changes=true, or raise the limit"
        )

    def state(self) -> dict[str, Any]:
        """Returns what a run that goes on from here has to know, as plain JSON values."""
        return {"seen": self._seen, "laps": [list(lap) for lap in self._laps]}


def loggable(bad: Bad) -> dict[str, Any]:
    """Returns what a line of `metrics.jsonl` says of it: nothing, where nothing is bad."""
    if not bad:
        return {}
    worst = list(bad.items())
    rest = total(dict(worst[LOGGED:]))
    return {"bad_records": dict(worst[:LOGGED]) | ({"other shards": {"any reason": rest}} if rest else {})}
