"""Fixtures of the store's tests: a stand-in exporter instead of a compiler."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from buildtool.store.store import Store

SCRIPT = Path(__file__).with_name("standin_exporter.py")


def _load() -> ModuleType:
    name = "standin_exporter"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPT)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def standin() -> Any:
    """The module ``standin_exporter``: example_key, example_manifest, StandInExporter."""
    return _load()


@pytest.fixture(scope="session")
def standin_script() -> Path:
    return SCRIPT


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "my artifacts")
