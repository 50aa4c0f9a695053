"""What is changed of torch's compiler for a GPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from exporters import inductor


class Joining(nn.Module):
    """An up block's beginning: two maps joined, normalized, convolved; and a join that is none of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, 24), nn.Conv2d(24, 8, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joined = torch.cat([a, b], dim=1)
        return self.conv(F.silu(self.norm(joined))), joined, torch.cat([a.flatten(1), b.flatten(1)], dim=1)


@torch.no_grad()
def test_maps_are_joined_channels_last_and_nothing_else_changes() -> None:
    inputs = torch.randn(2, 8, 6, 6), torch.randn(2, 16, 6, 6)
    module = Joining().eval()
    program = torch.export.export(module, inputs, strict=False)
    assert inductor.join_channels_last(program.graph) == 1
    program.graph.lint()
    program.graph_module.recompile()
    made = program.module()(*inputs)
    for got, wanted in zip(made, module(*inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert made[1].is_contiguous(memory_format=torch.channels_last)
    assert inductor.join_channels_last(program.graph) == 0


class Features:
    """What Inductor tells of a reduction."""

    def __init__(self, size: int, hint: str = "INNER") -> None:
        import sympy
        from torch._inductor.runtime.hints import ReductionHint

        self.reduction_numel, self.hint = sympy.Integer(size), ReductionHint[hint]

    def get_reduction_hint(self) -> object:
        return self.hint


def test_rows_of_sdxls_layer_norms_are_reduced_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    asked: list[int] = []

    def own(features: Features, cooperative: bool) -> bool:
        asked.append(int(features.reduction_numel))
        return False

    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", staticmethod(own))
    with inductor.choices():
        assert V.choices.should_use_persistent_reduction(Features(1280), False)
        assert not V.choices.should_use_persistent_reduction(Features(4096), False)
        assert not V.choices.should_use_persistent_reduction(Features(640, "OUTER"), False)
        assert not V.choices.should_use_persistent_reduction(Features(1280), True)
    assert asked == [4096, 640, 1280], "the rest is Inductor's own choice"
    assert not V.choices.should_use_persistent_reduction(Features(1280), False)
