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


def run(folder: Path, device: str | None = None) -> Checked:
    """Runs an artifact's golden tensors through its engines."""
    command = [sys.executable, *_CHECK, str(folder), "--json", *(["--device", device] if device else [])]
    # Where this package was found is where runtimes is, installed or not; not a folder of that name right here.
    places = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, stdin=subprocess.DEVNULL
    )
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
    again = shlex.join(["python", *command[1:]])
    return Checked({}, f"The check {died}. {said}{' ' if said else ''}Repeat it with: {again}")


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
