"""Who looks for clients that have left, for threads that wait for something else."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_SECONDS = 0.25  # between two looks


class Leavers:
    """Ends what is waited for on behalf of clients that have left, while nothing comes that would tell it."""

    def __init__(self) -> None:
        self.closed = False
        self._changed = threading.Condition()
        self._open: dict[object, tuple[threading.Event, Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def watched(self, gone: threading.Event, end: Callable[[], None]) -> Iterator[None]:
        """Call `end` when `gone` is set, or this is closed, before the block is left."""
        key = object()
        with self._changed:
            if self.closed:
                end()
            self._open[key] = gone, end
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="leavers", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._open.pop(key, None)

    def close(self) -> None:
        """End all that is waited for."""
        with self._changed:
            self.closed = True
            for _, end in self._open.values():
                end()
            self._changed.notify()

    def _look(self) -> None:
        with self._changed:
            while not self.closed:
                # Nobody can wait for an event and for something else at once.
                self._changed.wait(LOOK_SECONDS if self._open else None)
                for key, (gone, end) in list(self._open.items()):
                    if gone.is_set():
                        end()
                        del self._open[key]
