"""Runs the jobs of `gpu.py`, each in a process of its own: whoever has had a GPU gives its memory back by ending.

What each has found is written down as soon as it is known, in FOLDER/measured.jsonl; a run that goes on from there
(`--resume`) does not measure it again on the same device and packages. The traceback of what failed goes to
FOLDER/errors.log. A job's compilations are kept while the run lasts, for its later turns.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from on_gpu.job import Found, Job
from peers import OURS

BENCHMARKS = Path(__file__).parents[1]
LONGEST = 480.0  # seconds of a process
SHARE = "0.95"  # of the device's memory: the process has it alone, and PyTorch takes what there is
LATE = "time was up"


@dataclasses.dataclass
class Processes:
    """Who runs jobs, what they have found, and until when."""

    folder: Path
    scratch: Path  # weights and compilations, while the run lasts
    until: float  # by time.monotonic(); after that no process is started, and one that runs is ended
    say: Callable[[str], None]
    where: str = ""  # device and packages: what was measured with others is not the same
    known: dict[str, Found] = dataclasses.field(default_factory=dict)  # by job and `where`

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self.until

    def resume(self) -> None:
        """Takes what earlier runs have found; what was not measured is tried again, unless memory did not suffice."""
        file = self.folder / "measured.jsonl"
        for line in file.read_text().splitlines() if file.exists() else []:
            one = json.loads(line)
            if "gap" not in one["found"] or one["found"].get("no_memory"):
                self.known[self._key(Job(**one["job"]), one["where"])] = one["found"]

    def run(self, job: Job) -> Found:
        """Returns what a job finds, or {"gap": why it did not}; what is known already without a process."""
        key = self._key(job, self.where)
        if key not in self.known:
            found = self.start(job)
            if found.get("gap") == LATE:
                return found
            self.known[key] = found
            self._write_down(job, found)
            self.say(described(job, found))
        return self.known[key]

    def start(self, job: Job) -> Found:
        """Returns what a job finds in a new process."""
        if self.is_late:
            return {"gap": LATE}
        left = min(LONGEST, self.until - time.monotonic())
        command = [sys.executable, "-m", "on_gpu.job", json.dumps(dataclasses.asdict(job)), str(self.scratch)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A group of its own: torch.compile starts others, which are to end with it.
        with subprocess.Popen(command, env=self._environment(job), process_group=0, **streams) as process:
            try:
                output, errors = process.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                return {"gap": LATE if self.is_late else f"took longer than {LONGEST:.0f} s"}
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        found = next((json.loads(line) for line in output.splitlines()[::-1] if line.startswith('{"')), None)
        if found is None or process.returncode:
            last = (errors.strip().splitlines() or ["without a word"])[-1]
            found = {"gap": f"ended with {process.returncode}: {last[:200]}"}
        if "gap" in found:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "errors.log").open("a") as log:
                log.write(f"{json.dumps(dataclasses.asdict(job))}\n{errors}\n")
        return found

    def _environment(self, job: Job) -> dict[str, str]:
        cache = self.scratch / "compiled" / hashlib.sha256(self._key(job, "", turn=0).encode()).hexdigest()[:16]
        path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
        found = os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_MEM_FRACTION": SHARE}
        found |= {"JAX_COMPILATION_CACHE_DIR": str(cache / "jax")}
        found |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"), "TRITON_CACHE_DIR": str(cache / "triton")}
        if job.flags:
            found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {job.flags}".strip()
        return found if job.who.startswith(OURS) else found | {"JAX_PLATFORMS": "cpu"}  # which is imported there, too

    @staticmethod
    def _key(job: Job, where: str, **changes: object) -> str:
        return json.dumps([where, dataclasses.asdict(dataclasses.replace(job, **changes))], sort_keys=True)

    def _write_down(self, job: Job, found: Found) -> None:
        line = json.dumps({"where": self.where, "job": dataclasses.asdict(job), "found": found})
        with (self.folder / "measured.jsonl").open("a") as file:
            file.write(line + "\n")


def described(job: Job, found: Found) -> str:
    """Returns a line for people."""
    how = (f"{job.attention}, {job.remat}", f"parts of {job.microbatch}" if job.microbatch else "", job.flags)
    shown = ", ".join(part for part in how if part) if job.kind == "step" and job.who == OURS else ""
    words = [
        job.kind,
        job.variant,
        f"{job.n:,}" if job.n else "",
        job.who,
        shown,
        f"turn {job.turn}" if job.turn else "",
    ]
    return " · ".join(part for part in words if part) + f": {outcome(found)}"


def outcome(found: Found) -> str:
    if "gap" in found:
        return f"not measured: {found['gap']}"
    parts = []
    if seconds := found.get("seconds"):
        parts.append(f"{1000 * sorted(seconds)[len(seconds) // 2]:,.2f} ms")
    if (peak := found.get("peak_gb")) is not None:
        parts.append(f"{peak:.2f} GB")
    if (taken := found.get("compile_seconds")) is not None:
        parts.append(f"compiled in {taken:.0f} s")
    return ", ".join(parts) or "done"
