"""What the UNet is given at each step, with an engine that only looks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import TensorSpec
from runtimes.denoiser import Conditioning, Denoiser


class Looking:
    """Stands in for an artifact and its one engine."""

    batch, device = 1, torch.device("cpu")
    manifest = SimpleNamespace(key=SimpleNamespace(options={}))

    def __init__(self) -> None:
        shapes = {
            "sample": (1, 4, 2, 2),
            "timestep": (1,),
            "encoder_hidden_states": (1, 77, 8),
            "text_embeds": (1, 8),
            "time_ids": (1, 6),
        }
        self.inputs = tuple(
            TensorSpec(name=n, shape=s, dtype="float32", stride=torch.empty(s).stride()) for n, s in shapes.items()
        )
        self.seen: list[dict[str, Tensor]] = []

    def engine(self, component: str, variant: str) -> Any:
        return self

    def __call__(self, **inputs: Tensor) -> tuple[Tensor]:
        self.seen.append(inputs)
        return (inputs["sample"],)


def test_a_unet_that_takes_no_negative_text_gets_the_prompts_alone() -> None:
    class Guided(Looking):
        """Its engine takes two samples and one text, and gives the first sample's noise twice."""

        manifest = SimpleNamespace(key=SimpleNamespace(options={}), command=("sdxl-build", "torch"))

        def __init__(self) -> None:
            super().__init__()
            twice = {"sample": (2, 4, 2, 2), "text_embeds": (2, 8), "time_ids": (2, 6)}
            self.inputs = tuple(
                TensorSpec(name=s.name, shape=twice.get(s.name, s.shape), dtype=s.dtype, stride=s.stride)
                for s in self.inputs
            )

    artifact: Any = Guided()
    denoiser = Denoiser(artifact)
    embeds, pooled, ids = torch.ones(1, 77, 8), torch.ones(1, 8), torch.ones(1, 6)
    zeros, none = torch.zeros(1, 77, 8), torch.zeros(1, 8)
    denoiser.prepare(Conditioning(embeds, pooled, ids, zeros, none, ids), torch.tensor([1.0]), guided=1)
    denoiser(torch.zeros(1, 4, 2, 2), 0)
    (seen,) = artifact.seen
    assert torch.equal(seen["encoder_hidden_states"], embeds)
    assert torch.equal(seen["text_embeds"], torch.cat([none, pooled])) and seen["time_ids"].shape == (2, 6)
    with pytest.raises(SdxlError, match=r"without a negative prompt, and takes none.*or build: sdxl-build torch"):
        denoiser.prepare(Conditioning(embeds, pooled, ids, embeds, none, ids), torch.tensor([1.0]), guided=1)


def test_every_steps_time_is_aligned_for_compiled_code() -> None:
    artifact: Any = Looking()
    denoiser = Denoiser(artifact)
    embeds, pooled, ids = torch.zeros(1, 77, 8), torch.zeros(1, 8), torch.zeros(1, 6)
    times = torch.tensor([999.0, 501.5, 1.0])
    denoiser.prepare(Conditioning(embeds, pooled, ids, embeds, pooled, ids), times)
    for step in range(3):
        denoiser(torch.zeros(1, 4, 2, 2), step)
    given = [seen["timestep"] for seen in artifact.seen]
    assert [float(time) for time in given] == times.tolist()
    assert all(time.shape == (1,) and time.data_ptr() % 16 == 0 for time in given)
