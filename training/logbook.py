"""Losses to a file and the terminal, checkpoints that a broken run goes on from."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch


class Logbook:
    """`folder/log.jsonl`, one object a line, and one line of text on stdout."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "log.jsonl"
        self.start = time.monotonic() - self._seconds_before()
        # A killed run may have left half a row.
        whole = not self.file.exists() or self.file.read_bytes()[-1:] in (b"", b"\n")
        self.before = "" if whole else "\n"

    def _seconds_before(self) -> float:
        """Of the runs that this one goes on from, so that the last row has the seconds of all."""
        if not self.file.exists():
            return 0.0
        for line in reversed(self.file.read_text().splitlines()):
            try:
                return float(json.loads(line)["seconds"])
            except (ValueError, KeyError):  # a row cut short where a run was killed
                continue
        return 0.0

    def write(self, stage: str, **values: Any) -> None:
        row = {"stage": stage, "seconds": round(time.monotonic() - self.start, 1), **values}
        with self.file.open("a") as file:
            file.write(self.before + json.dumps(row) + "\n")
        self.before = ""
        said = " ".join(
            f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
        )
        print(said, flush=True)


class Checkpoint:
    """One stage's state in one file, replaced whole. A finished stage keeps its weights alone."""

    def __init__(self, folder: Path, stage: str, every_seconds: float = 60.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{stage}.pt"
        self.every_seconds = every_seconds
        self.last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        if not self.file.exists():
            return None
        state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
        return state

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.every_seconds

    def save(self, state: dict[str, Any]) -> None:
        staged = self.file.with_suffix(".tmp")
        torch.save(state, staged)
        os.replace(staged, self.file)
        self.last = time.monotonic()


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the top learning rate: a linear start, then half a cosine to a hundredth."""
    import math

    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
