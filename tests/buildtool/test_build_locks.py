"""When a build gives the locks of its code back: compilers, weights and golden tensors are left out."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from buildtool import build, compiler, plan
from buildtool.plan import Spec
from buildtool.progress import Progress
from buildtool.store.store import Store


class Enough(Exception):
    """The build is as far as the test goes."""


class NoPool:
    """Stands in for the compilers."""

    def __init__(self, *arguments: Any) -> None: ...

    def __enter__(self) -> "NoPool":
        return self

    def __exit__(self, *error: object) -> None: ...

    def prepare(self, jobs: list[compiler.Job], scratch: Path) -> None: ...

    def start(self, jobs: list[compiler.Job], at_once: int) -> None: ...


def test_each_components_lock_goes_when_its_code_is_there(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planned,) = plan.plan(Spec(backend="torch", model=str(micro_model), gpu="cpu", artifacts=tmp_path))
    names = {key.digest: name for name, key in planned.code_keys.items()}
    held: set[str] = set()
    kept: list[tuple[str, set[str]]] = []

    @contextlib.contextmanager
    def building(self: Store, digest: str, message: Any = None) -> Iterator[None]:
        held.add(names[digest])
        yield
        held.discard(names[digest])

    def assemble(*arguments: Any) -> None:
        raise Enough

    monkeypatch.setattr(Store, "building", building)
    monkeypatch.setattr(compiler, "Pool", NoPool)
    monkeypatch.setattr(build._Build, "_golden", lambda self, tensors, reference: None)
    monkeypatch.setattr(build._Build, "_keep_code", lambda self, name, pool: kept.append((name, set(held))))
    monkeypatch.setattr(build._Build, "_assemble", assemble)
    with pytest.raises(Enough):
        build._Build(planned, Store(tmp_path), Progress()).run()
    order = [name for name, _ in kept]
    assert sorted(order) == sorted(planned.code_keys) and order[-1] == "unet", "which takes longest"
    for i, (_, then) in enumerate(kept):
        assert then == set(order[i:]), "locks of what is done are given back, the others are held"
    assert not held
