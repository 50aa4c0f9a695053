"""What a build shows, with a recorder in the place of rich's bars."""

import threading
from typing import Any

from buildtool.progress import Progress


class Recorder:
    """Stands in for rich's bars: remembers what each was told, by its name."""

    def __init__(self) -> None:
        self.told: dict[str, list[float]] = {}

    def add_task(self, name: str, total: Any) -> str:
        self.told[name] = []
        return name

    def update(self, task: str, completed: float, total: float) -> None:
        self.told[task].append(completed / total)


def test_threads_have_stages_of_their_own() -> None:
    progress, bars = Progress(quiet=True), Recorder()
    progress._bars = bars
    begun, go_on = threading.Event(), threading.Event()

    def beside() -> None:
        with progress.stage("weights"):
            progress.update(1, 10)
            begun.set()
            assert go_on.wait(10)
            progress.update(2, 10)

    thread = threading.Thread(target=beside)
    with progress.stage("eager"):
        thread.start()
        assert begun.wait(10)
        progress.update(5, 10)
        with progress.stage("inner"):
            go_on.set()
            thread.join()
            progress.update(7, 10)
        progress.update(6, 10)
    progress.update(9, 10)  # no stage
    assert bars.told == {"eager": [0.5, 0.6, 1], "weights": [0.1, 0.2, 1], "inner": [0.7, 1]}
