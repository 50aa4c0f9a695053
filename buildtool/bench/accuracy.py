"""Whether pictures of the model ``tiny`` show what their prompts say.

What tells it, ``training.verdicts``, is part of the project's source and of no wheel. It is started in a process of its
own, if it lies beside this package, and never imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from buildtool.bench.cases import Result
from buildtool.store.errors import SdxlError

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny"
JUDGE = "training.verdicts"


def available() -> bool:
    """Whether this package lies in the project's source."""
    return ROOT.joinpath(*JUDGE.split(".")).with_suffix(".py").is_file()


def held_out(count: int, width: int, height: int) -> list[str]:
    """Prompts of the model's world, none of which it was trained on.

    Raises:
        SdxlError: this package doesn't lie in the project's source.
    """
    if not available():
        raise SdxlError(
            f"--prompts {MODEL}:{count} needs the project's source, and this sdxl-bench is installed without it.",
            "Run it from a clone (pip install -e .), or give --prompts FILE.",
        )
    prompts: list[str] = _ask(["--prompts", str(count), "--size", f"{width}x{height}"])
    return prompts


def judge(results: Sequence[Result], prompts: Sequence[tuple[str, int]]) -> str:
    """Gives results their verdicts, if all are of the model ``tiny``.

    Returns:
        Why there are none, in a line; empty if there are, and if the pictures or prompts are none of its world.
    """
    if any(result.case.manifest.key.model != MODEL for result in results):
        return ""
    if not available():
        return (
            "Whether pictures show what their prompts say isn't judged: the judge is part of the project's source "
            "(training/), and this sdxl-bench is installed without it."
        )
    pairs = [
        {"prompt": text, "picture": str(picture)}
        for result in results
        for (text, _), picture in zip(prompts, result.pictures, strict=True)
    ]
    try:
        verdicts = _ask([], "".join(json.dumps(pair) + "\n" for pair in pairs))
    except SdxlError as error:  # what was measured is worth having without it
        return str(error)
    for number, result in enumerate(results):
        result.right = verdicts[number * len(prompts) : (number + 1) * len(prompts)]
    return ""


def _ask(words: Sequence[str], lines: str = "") -> Any:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", JUDGE, *words]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise SdxlError(f"{JUDGE}: {said[-1]}")
    return json.loads(done.stdout)
