"""What several of the runtime's tests look at."""

from typing import Any

import pytest

from runtimes.artifact import Artifact


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(model, engine) of the engines that are loaded, in that order."""
    seen: list[tuple[str, str]] = []
    load = Artifact.unchecked_engine

    def counted(self: Artifact, component: str, variant: str) -> Any:
        seen.append((self.manifest.key.model, f"{component}.{variant}"))
        return load(self, component, variant)

    monkeypatch.setattr(Artifact, "unchecked_engine", counted)
    return seen
