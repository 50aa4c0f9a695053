"""``tiny`` built for this machine's GPU, in every precision, once a session."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PRECISIONS = ("fp16", "bf16", "fp32")
RESOLUTIONS = {"fp16": ("256x256", "320x192")}
"""Where more than tiny's own resolution is built."""

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips everything here on a machine without a GPU."""
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    if own and not torch.cuda.is_available():
        for item in own:
            item.add_marker(pytest.mark.skip(reason="there is no GPU that torch can use"))


@pytest.fixture(scope="session")
def command() -> Run:
    """Runs ``python -m MODULE …`` in a process of its own: the real command lines."""

    def run(module: str, *words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, **settings)

    return run


@pytest.fixture(scope="session")
def built(store_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Precision -> what ``sdxl-build --json`` said of each resolution. All are built at the same time."""
    words = ["-m", "buildtool.cli", "torch", "--model", "tiny", "--gpu", "auto", "--json", "--artifacts"]
    logs = tmp_path_factory.mktemp("builds")
    running = {}
    for precision in PRECISIONS:
        sizes = [word for size in RESOLUTIONS.get(precision, ()) for word in ("--resolution", size)]
        with open(logs / f"{precision}.out", "w") as out, open(logs / f"{precision}.err", "w") as errors:
            line = [sys.executable, *words, str(store_root), "--precision", precision, *sizes]
            running[precision] = subprocess.Popen(line, stdout=out, stderr=errors, stdin=subprocess.DEVNULL)
    codes = {precision: process.wait() for precision, process in running.items()}
    for precision, code in codes.items():
        assert code == 0, f"{precision}: {(logs / f'{precision}.err').read_text()[-4000:]}"
    return {p: json.loads((logs / f"{p}.out").read_text())["artifacts"] for p in PRECISIONS}


@pytest.fixture(scope="session")
def artifacts(built: dict[str, list[dict[str, Any]]]) -> dict[str, Path]:
    """Precision -> the artifact of tiny at 256x256; ``wide`` -> that at 320x192 in fp16."""
    found = {precision: Path(rows[0]["path"]) for precision, rows in built.items()}
    return {**found, "wide": Path(built["fp16"][1]["path"])}
