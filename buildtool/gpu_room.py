"""What a build takes of a GPU's memory, so that it fits: who runs where, and how many compilers at once."""

import contextlib
import ctypes
import gc
from collections.abc import Mapping

from exporters.base import Request

GB = 1_000_000_000
PROCESS_BYTES = 1 * GB
"""A process on a GPU: its context, and the libraries' code and workspaces. An estimate."""
ACTIVATION_BYTES = 4 * GB
"""fp32 eager of the UNet or the VAE for each megapixel and image. An estimate."""


def reference_bytes(parameters: Mapping[str, int], request: Request) -> int:
    """GPU memory that fp32 eager of the largest component takes, at most."""
    return 4 * max(parameters.values()) + int(ACTIVATION_BYTES * _megapixels(request)) + PROCESS_BYTES


def compiler_bytes(parameters: Mapping[str, int], request: Request) -> int:
    """GPU memory of one compiler: the weights that it compiles with; it runs nothing of the network.

    The largest of a UNet's segments is taken to be half as large again as their mean.
    """
    width, sizes = 4 if request.precision == "fp32" else 2, dict(parameters)
    if segments := request.options.get("segments"):
        sizes["unet"] = sizes["unet"] * 3 // (2 * segments)
    return width * max(sizes.values()) + PROCESS_BYTES


def reference_fits(parameters: Mapping[str, int], request: Request) -> bool:
    """Whether fp32 eager fits beside one compiler into what is free."""
    return reference_bytes(parameters, request) + compiler_bytes(parameters, request) <= free_bytes(request)


def compilers(parameters: Mapping[str, int], request: Request, beside_reference: bool) -> int:
    """How many compilers at once fit into what is free, at least one; one more begins for all of them."""
    left = free_bytes(request) - PROCESS_BYTES - (reference_bytes(parameters, request) if beside_reference else 0)
    return max(1, left // compiler_bytes(parameters, request))


def free_bytes(request: Request) -> int:
    """Free memory of the request's GPU, in bytes."""
    import torch

    return torch.cuda.mem_get_info(request.device)[0]


def release() -> None:
    """Gives back what this process no longer uses, on the GPU too: other processes want it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what many small tensors had: gigabytes
        ctypes.CDLL(None).malloc_trim(0)
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _megapixels(request: Request) -> float:
    return request.width * request.height * request.batch / 2**20
