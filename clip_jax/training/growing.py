"""Files that grow by their end, and are as long as what was written to them when a run is killed.

In a bucket nothing can be appended. There a file is sent again, whole, in the background: no step waits for it. What a
run has to find when it goes on from a checkpoint is there before that is: `flush` is called first.
"""

import threading
import time

from clip_jax.elsewhere import Elsewhere
from clip_jax.files import AnyPath, writable

# From one sending to the next. A run of 500,000 steps that logs every 50 has 6 MB of lines at its end, and has sent
# them 10,000 times at most: 0.1 MB a second, where a step takes half of one.
SECONDS = 15


class Appended:
    """A file of this machine's."""

    def __init__(self, path: AnyPath):
        """Opens it at its end.

        Raises:
            UserError: it cannot be written; so do all methods.
        """
        self._path = path
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")

    def write(self, data: bytes) -> None:
        with writable(self._path):
            self._file.write(data)
            self._file.flush()

    def flush(self) -> None:
        """Returns when all that was written is there: it always is."""

    def close(self) -> None:
        with writable(self._path):
            self._file.close()


class Resent:
    """A file in a bucket."""

    def __init__(self, path: Elsewhere):
        """Goes on from what is there.

        Raises:
            UserError: it cannot be read or written; so do all methods, `write` later.
        """
        self._path = path
        self._content = bytearray(path.read_bytes() if path.exists() else b"")
        self._sent = len(self._content)
        self._hurries, self._closes = False, False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._send, name="resent", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        with self._changed:
            self._content += data
            self._changed.notify_all()
            self._check()

    def flush(self) -> None:
        """Returns when all that was written is there."""
        with self._changed:
            self._hurries = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error or self._sent == len(self._content))
            self._hurries = False
            self._check()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with self._changed:
                self._closes = True
                self._changed.notify_all()
            self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _send(self) -> None:
        """Sends what there is, whenever there is more; the thread's work."""
        last = float("-inf")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closes or self._sent < len(self._content))
                if self._closes:
                    return
                left = last + SECONDS - time.monotonic()
                self._changed.wait_for(lambda: self._hurries, timeout=max(0.0, left))
                content = bytes(self._content)
            last = time.monotonic()
            try:
                self._path.write_bytes(content)
            except Exception as error:  # whatever it is, whoever writes next has to know
                self._error = error
            with self._changed:
                self._sent = len(content)
                self._changed.notify_all()
                if self._error is not None:
                    return


def growing(path: AnyPath) -> Appended | Resent:
    """Returns a file that is written at its end."""
    return Resent(path) if isinstance(path, Elsewhere) else Appended(path)
