"""Normal noise, drawn as diffusers' ``randn_tensor`` draws it."""

from collections.abc import Sequence

import torch

Generators = torch.Generator | Sequence[torch.Generator] | None


def randn(
    shape: Sequence[int], generator: Generators, device: torch.device | str | None, dtype: torch.dtype
) -> torch.Tensor:
    """Standard normal noise of ``shape`` on ``device``.

    A generator on the CPU draws there whatever the device, so that one seed gives one picture on
    every machine. A list holds one generator for each entry of the first dimension (a list of one
    draws everything).

    Raises:
        ValueError: a GPU's generator for a tensor on another device, or a list of another length.
    """
    device = torch.device(device or "cpu")
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators were given for {shape[0]} images")
        return torch.cat([randn((1, *shape[1:]), one, device, dtype) for one in generator])
    source = device if generator is None else generator.device
    if source.type not in ("cpu", device.type):
        raise ValueError(f"A generator on {source} cannot draw for a tensor on {device}")
    draw_on = source if source.type == "cpu" else device
    return torch.randn(tuple(shape), generator=generator, device=draw_on, dtype=dtype).to(device)
