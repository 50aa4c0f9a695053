"""Random weights that a GPU draws."""

import pytest
import torch

from buildtool.checkpoint import random_weights
from tests.buildtool.checkpoint.test_random_weights import drawn_by_torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_they_are_the_cpus_bits(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(random_weights, "_DEVICE_CHUNK", 300_000)
    matrix, norm, *others = drawn_by_torch(monkeypatch, dtype, "cuda")
    assert torch.equal(matrix, others[0]) and torch.equal(norm, others[1])
