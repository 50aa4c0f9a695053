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


def test_what_a_triton_kernel_writes_is_found_once_for_each_kind_of_arguments() -> None:
    asked: list[dict[str, object]] = []

    def identify(kernel: object, kwargs: dict[str, object], tma_descriptor_metadata: object) -> object:
        asked.append(dict(kwargs))
        return ["out", len(asked)]

    again = inductor.remembered(identify)  # type: ignore[arg-type]
    kernel, other = object(), object()
    x, longer, half = torch.zeros(2), torch.zeros(3), torch.zeros(2, dtype=torch.float16)
    first = again(kernel, {"x": x, "C": 64, "SILU": True}, {})
    assert again(kernel, {"x": longer, "C": 64, "SILU": True}, {}) is first and len(asked) == 1
    for different in ({"x": half, "C": 64, "SILU": True}, {"x": x, "C": 1, "SILU": True}, {"x": x, "C": 64, "SILU": 1}):
        assert again(kernel, different, {}) is not first
    assert again(other, {"x": x, "C": 64, "SILU": True}, {}) is not first
    assert len(asked) == 5
    described = {"x": ("stable", ([128, 64],))}
    assert again(kernel, {"x": x, "C": 64, "SILU": True}, described) is not first
    assert again(kernel, {"x": x, "C": 64, "SILU": True}, {"x": ("stable", ([128, 32],))}) is not first
    again(kernel, {"x": x, "C": 64, "SILU": True}, described)
    assert len(asked) == 7
    for times in (8, 9):  # a value that has no hash
        again(kernel, {"x": x, "grid": [1]}, {})
        assert len(asked) == times


def test_nothing_is_printed_for_a_log_that_nobody_asked_for() -> None:
    from torch._dynamo.repro import after_aot
    from torch._higher_order_ops import triton_kernel_wrap

    names = ("identify_accessed_tensors", "identify_mutated_tensors")
    before = [getattr(triton_kernel_wrap, name, None) for name in names]
    printed = after_aot.save_graph_repro
    with inductor.quicker():
        within = [getattr(triton_kernel_wrap, name, None) for name in names]
        assert after_aot.save_graph_repro is not printed
    assert any(before) and all(a is not b or a is None for a, b in zip(before, within, strict=True))
    assert [getattr(triton_kernel_wrap, name, None) for name in names] == before
    assert after_aot.save_graph_repro is printed


@pytest.mark.parametrize("torch_scales", [False, True])
def test_every_program_of_a_kernel_gets_its_scratch(torch_scales: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 allocates it, and as 2.13 does."""
    from torch._inductor.codegen.common import TritonScratchWorkspace
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

    def cpp_scratch(self: object, idx: int, workspace: TritonScratchWorkspace, prefix: str | None = None) -> object:
        if workspace.size == 0:
            return ["CUdeviceptr scratch_3 = 0;"], "scratch_3"
        return [f"int64_t scratch_{idx}_size[] = {{{workspace.size}}};", "int64_t stride[] = {1};"], f"scratch_{idx}"

    if not torch_scales:
        monkeypatch.setattr(CUDADeviceOpOverrides, "cpp_scratch", cpp_scratch)
    allocate = CUDADeviceOpOverrides.cpp_scratch
    with inductor.scratch_for_all():
        made = CUDADeviceOpOverrides().cpp_scratch(3, TritonScratchWorkspace(384, lambda: "byte"))
        nothing = CUDADeviceOpOverrides().cpp_scratch(3, TritonScratchWorkspace(0, lambda: "byte"))
    assert made is not None and made[1] == "scratch_3"
    assert made[0][0] == "int64_t scratch_3_size[] = {static_cast<int64_t>(384) * grid_0 * grid_1 * grid_2};"
    assert "{1}" in made[0][1]
    assert nothing == (["CUdeviceptr scratch_3 = 0;"], "scratch_3")
    assert CUDADeviceOpOverrides.cpp_scratch is allocate


def test_scratch_that_another_torch_allocates_in_its_own_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codegen.common import TritonScratchWorkspace
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

    monkeypatch.setattr(CUDADeviceOpOverrides, "cpp_scratch", lambda *_: (["auto s = scratch(384, 1);"], "s"))
    with inductor.scratch_for_all(), pytest.raises(RuntimeError, match="unknown way"):
        CUDADeviceOpOverrides().cpp_scratch(3, TritonScratchWorkspace(384, lambda: "byte"))
