"""A stand-in for the Python that OneDiff is installed in: this one, with a stand-in ``onediff`` and ``nexfort``."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGES = Path(__file__).parent / "standin_onediff"
INSTALLED = {"onediff": "1.2.0+standin", "nexfort": "0.1.dev330+standin"}


def write(folder: Path, installed: Mapping[str, str] = INSTALLED) -> Path:
    """A program that runs as that Python: this one with stand-in packages, whose metadata says ``installed``."""
    for name, version in installed.items():
        info = folder / "packages" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    places = os.pathsep.join([str(folder / "packages"), str(PACKAGES)])
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(places)} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return python
