"""FreeU in real arithmetic against diffusers' Fourier transform, and inside a UNet."""

from pathlib import Path

import pytest
import torch

from buildtool import models
from exporters import freeu, onnx_graph, sdxl
from exporters.base import Request

VALUES = {"s1": 0.6, "s2": 0.4, "b1": 1.1, "b2": 1.2}
REQUEST = Request(width=64, height=64, batch=1, precision="fp32", device="cpu", target="cpu", options={"freeu": VALUES})


@pytest.mark.parametrize("size", [(32, 32), (8, 16), (7, 9), (2, 3), (1, 5), (1, 1)])
def test_low_frequencies_are_those_of_the_fourier_filter(size: tuple[int, int]) -> None:
    from diffusers.utils.torch_utils import fourier_filter

    maps = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0)) + 1
    wanted = fourier_filter(maps, threshold=1, scale=0.3)
    torch.testing.assert_close(freeu.scale_low_frequencies(maps, 0.3), wanted, rtol=1e-5, atol=2e-6)
    half = freeu.scale_low_frequencies(maps.half(), 0.3)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, wanted.half(), rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_a_unet_is_changed_as_diffusers_changes_it(micro_model: Path) -> None:
    source = models.resolve(str(micro_model))
    plain, asked = sdxl.component("unet"), sdxl.component("unet", REQUEST.options)
    inputs = sdxl.example_inputs(asked, source.configs, REQUEST, "cfg")
    unchanged, reference = (
        row.reference(source.configs["unet"], source.tensors("unet"), "cpu") for row in (plain, asked)
    )
    (wanted,), (before,) = reference(**inputs), unchanged(**inputs)
    freeu.enable(unchanged.model, VALUES)
    (made,) = unchanged(**inputs)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5 * float(wanted.std()))
    assert (before - wanted).abs().max() > 0.1 * wanted.std()


class Filter(torch.nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return freeu.scale_low_frequencies(maps, 0.3)


def test_no_graph_has_complex_tensors_or_large_constants() -> None:
    """At 4096 pixels, SDXL's maps are 256x256 where FreeU scales them; ONNX folds what depends on no input."""
    program = torch.export.export(Filter(), (torch.empty(1, 8, 256, 256, device="meta"),), strict=False)
    assert not program.constants, "what is no parameter would be shared by checkpoints"
    depend: set[torch.fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or depend & set(node.all_input_nodes):
            depend.add(node)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert not value.is_complex()
            assert node in depend or value.numel() * 4 < onnx_graph.EMBEDDED
    assert depend
