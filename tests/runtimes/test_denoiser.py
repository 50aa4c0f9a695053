"""What the UNet is given at each step, with an engine that only looks."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

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
