"""What a build shows while it works: a line per stage with its elapsed time, on stderr, if that is a terminal."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any


class Progress:
    """Stages of a build, each timed; silent (but still timing) when stderr is no terminal.

    Threads have stages of their own.

    Args:
        quiet: show nothing; by default nothing is shown where stderr is no terminal.
    """

    def __init__(self, quiet: bool | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._quiet = not sys.stderr.isatty() if quiet is None else quiet
        self._bars: Any = None
        self._current = threading.local()
        self._beside: dict[str, Any] = {}

    def __enter__(self) -> "Progress":
        if not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bars = Bars(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows and times one stage; stages of the same name add up."""
        began = time.perf_counter()
        before, task = getattr(self._current, "task", None), None
        if self._bars is not None:
            task = self._bars.add_task(name, total=None)
        self._current.task = task
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)
            if self._bars is not None:
                self._bars.update(task, total=1, completed=1)
            self._current.task = before

    def add(self, name: str, seconds: float) -> None:
        """Counts and shows a stage that ran beside this process."""
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 3)
        if self._bars is not None:
            self._bars.add_task(f"{name} [{seconds:.0f} s]", total=1, completed=1)

    def beside(self, name: str, part: float) -> None:
        """How far a stage is that runs beside this process, from 0 to 1; at 1 its bar goes."""
        if self._bars is None:
            return
        if part >= 1:
            if name in self._beside:
                self._bars.remove_task(self._beside.pop(name))
            return
        if name not in self._beside:
            self._beside[name] = self._bars.add_task(name, total=1.0)
        self._bars.update(self._beside[name], completed=part)

    def update(self, done: int, total: int) -> None:
        """How far this thread's current stage is."""
        task = getattr(self._current, "task", None)
        if self._bars is not None and task is not None:
            self._bars.update(task, completed=done, total=total)

    def say(self, line: str) -> None:
        """One line that is always shown: it tells what the user didn't ask for."""
        if self._bars is not None:
            self._bars.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr)
