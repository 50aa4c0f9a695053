"""Starts the check of a built artifact: ``python -m runtimes.check`` in a fresh process, never imported."""

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CHECK = ("-m", "runtimes.check")


@dataclass(frozen=True)
class Checked:
    """What the check said: ``unet.cfg`` -> ``error``, ``tolerance``, ``passed``; or in ``problem`` why it didn't."""

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""


class Waiting:
    """A check's process that was started early: it imports torch, and then waits for the folder.

    Args:
        device: where the engines will run; None for what the artifact was built for.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = device
        # Where this package was found is where runtimes is, installed or not; not a folder of that name right here.
        places = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            _command("-", device),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONSAFEPATH": "1"},
        )

    def run(self, folder: Path) -> "subprocess.CompletedProcess[str]":
        """What came of the folder; as of a process that was started for it."""
        try:
            said = self._process.communicate(os.fsencode(folder) + b"\n")
        finally:
            self.close()
        stdout, stderr = (text.decode(errors="replace") for text in said)
        return subprocess.CompletedProcess(_command(folder, self.device), self._process.returncode, stdout, stderr)

    def close(self) -> None:
        """Ends it, if it is there still."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def run(folder: Path, waiting: Waiting | None = None) -> Checked:
    """Runs an artifact's golden tensors through its engines, in ``waiting`` or a process of its own."""
    done = (waiting or Waiting()).run(folder)
    variants = _variants(done.stdout)
    if done.returncode in (0, 1) and variants:
        unexplained = done.returncode == 1 and all(v.get("passed", False) for v in variants.values())
        return Checked(variants, f"The check failed. {_last_line(done.stderr)}" if unexplained else "")
    said = _last_line(done.stderr)
    if done.returncode == 1 and said.startswith("Error: "):
        return Checked({}, said.removeprefix("Error: "))
    if done.returncode < 0:
        died = f"died with {signal.Signals(-done.returncode).name}: the compiled code doesn't run here"
    else:
        died = f"ended with exit code {done.returncode} and no result"
    again = shlex.join(["python", *done.args[1:]])
    return Checked({}, f"The check {died}. {said}{' ' if said else ''}Repeat it with: {again}")


def _command(folder: str | os.PathLike[str], device: str | None) -> list[str]:
    return [sys.executable, *_CHECK, str(folder), "--json", *(["--device", device] if device else [])]


def _variants(stdout: str) -> dict[str, dict[str, Any]]:
    """The check's answer: the last line, or all, of what it printed (libraries talk on stdout too)."""
    lines = stdout.strip().splitlines()
    for text in (stdout, lines[-1] if lines else ""):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        variants = found.get("variants") if isinstance(found, dict) else None
        if isinstance(variants, dict) and all(isinstance(v, dict) for v in variants.values()):
            return variants
    return {}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
