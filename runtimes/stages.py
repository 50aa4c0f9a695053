"""Calls of a pipeline stage by stage: a run's prompts, then its pictures' steps, then their pixels.

What ``--memory staged``, ``model-offload`` and ``sequential`` do: each component is loaded once a run.
"""

import gc
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtimes import memory
from runtimes.artifact import Artifact
from runtimes.cuda_graph import GraphPool

log = logging.getLogger("runtimes")

Bar = Callable[[str], AbstractContextManager[Any]]


def announce(mode: str) -> None:
    """Says what a mode costs."""
    if mode == memory.STAGED:
        log.info("Memory: staged. Each run loads its components anew: with --prompts -, each line.")
    if mode == memory.MODEL_OFFLOAD:
        log.info("Memory: model-offload. CUDA graphs are off: weights move between stages, and graphs hold addresses.")
    if mode == memory.SEQUENTIAL:
        log.info("Memory: sequential. The UNet's segments take turns on the GPU, in every step; CUDA graphs are off.")


def free(artifact: Artifact, keep: Collection[str]) -> None:
    """Gives back what all components but some hold, on the device and in this process."""
    cuda = artifact.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(artifact.device)  # no call may still be reading
    if artifact.free(keep):
        log.info("Memory: all but %s were freed.", ", ".join(sorted(keep)) or "nothing")
        gc.collect()  # an engine and its CUDA graph refer to each other
        if cuda:
            GraphPool.empty(artifact.device)
            torch.cuda.empty_cache()


@dataclass
class Call:
    """One call of a pipeline, by its arguments; what its stages have made so far takes their place."""

    title: str
    arguments: dict[str, Any]
    latents: Tensor | None = None


class Stages:
    """Several calls, one stage of all after the other.

    Args:
        pipeline: what ``runtimes.load`` returned.
        calls: with a list of prompts and a list of generators each, and no embeddings.
        bar: shows the progress of a call's steps.
        after: called after each stage of a call with the steps that it took (0 but for one stage); the pipeline then
            has that stage's times.
    """

    def __init__(self, pipeline: Any, calls: Sequence[Call], bar: Bar, after: Callable[[int], None]) -> None:
        self._pipeline, self._bar, self._after = pipeline, bar, after
        self._calls = calls

    def prepare(self) -> None:
        """Everything up to the latents."""
        for call in self._calls:
            self._encode_prompt(call.arguments)
            self._after(0)
        for call in self._calls:
            if call.arguments.get("image") is not None:
                self._encode_image(call.arguments)
                self._after(0)
        for call in self._calls:
            with self._bar(call.title) as progress:
                made = self._pipeline(**call.arguments, output_type="latent", progress=progress)
            call.latents = made.images
            self._after(call.arguments["num_inference_steps"])

    def decode(self, call: Call) -> list[Any]:
        """A call's pictures."""
        made: list[Any] = self._pipeline.decode(call.latents)
        call.latents = None
        self._after(0)
        return made

    def _encode_prompt(self, arguments: dict[str, Any]) -> None:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        made = self._pipeline.encode_prompt(
            arguments.pop("prompt"),
            negative_prompt=arguments.pop("negative_prompt"),
            do_classifier_free_guidance=arguments["guidance_scale"] > 1,
            width=arguments["width"],
            height=arguments["height"],
        )
        arguments.update(zip(names, made, strict=True))

    def _encode_image(self, arguments: dict[str, Any]) -> None:
        arguments["image"] = self._pipeline.encode_start_image(
            arguments["image"],
            len(arguments["generator"]),
            arguments["prompt_embeds"].dtype,
            arguments["generator"],
            width=arguments["width"],
            height=arguments["height"],
        )
