"""Loads artifacts and makes pictures. Never imports exporters, diffusers or transformers."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from runtimes.gpu_upload import Uploads
    from runtimes.pipeline import Pipeline

__all__ = ["load"]


def load(
    path: "str | os.PathLike[str] | list[str | os.PathLike[str]]",
    *,
    device: "str | torch.device | None" = None,
    scheduler: Any = None,
    memory: str = "resident",
    uploads: "Uploads | None" = None,
    beside: "Pipeline | None" = None,
) -> "Pipeline":
    """Opens an artifact, or several of one model in different resolutions.

    Args:
        path: an artifact's folder, or a list of them.
        device: where to run, ``cuda:1`` for example; by default what the artifact was built for.
        scheduler: any diffusers scheduler instead of the artifact's own.
        memory: what stays loaded between the stages of a call: ``resident`` (everything), ``staged`` (nothing),
            ``model-offload`` (weights, in pinned host memory) or ``sequential`` (the same, and the UNet's segments
            take turns on the GPU).
        uploads: from :func:`runtimes.gpu_upload.begin`, where the upload of the weights to a GPU was begun
            before torch was imported.
        beside: a loaded pipeline of another model, such as a refiner's base: what both have the same of weights and
            code is in memory once.

    Raises:
        SdxlError: no artifact there, or one that can't run here, or not with this memory mode.
    """
    from buildtool.store.errors import SdxlError
    from runtimes.artifact import open_all, open_beside
    from runtimes.pipeline import Pipeline

    paths = path if isinstance(path, list) else [path]
    if beside is None:
        return Pipeline(open_all(paths, device, uploads, memory), scheduler, memory)
    if memory != beside.memory:
        raise SdxlError(f"memory={memory!r} was asked for beside a pipeline of memory={beside.memory!r}; both are one.")
    return Pipeline(open_beside(paths, device, memory, beside.artifacts[0]), scheduler, memory, beside)
