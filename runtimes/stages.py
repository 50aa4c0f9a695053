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
    refine: dict[str, Any] | None = None
    """The refiner's arguments, but for the latents that it goes on from."""
    embedding: Sequence[str] = ()
    """The textual inversions that its prompts may have."""


class Stages:
    """Several calls, one stage of all after the other.

    Args:
        pipeline: what ``runtimes.load`` returned.
        calls: with a list of prompts and a list of generators each, and no embeddings.
        bar: shows the progress of a call's steps.
        after: called after each stage of a call with the pipeline that ran it, which has its times, and whether it
            took steps.
        refiner: the pipeline of the calls' ``refine``.
        teach: makes a call's textual inversions known, before its prompts are encoded.
    """

    def __init__(
        self,
        pipeline: Any,
        calls: Sequence[Call],
        bar: Bar,
        after: Callable[[Any, bool], None],
        refiner: Any = None,
        teach: Callable[[Sequence[str]], None] = lambda texts: None,
    ) -> None:
        self._pipeline, self._bar, self._after = pipeline, bar, after
        self._calls, self._refiner, self._teach = calls, refiner, teach

    def prepare(self) -> None:
        """Everything up to the latents."""
        refined = [(call, call.refine) for call in self._calls if call.refine is not None]
        for call in self._calls:
            self._teach(call.embedding)
            self._encode_prompt(self._pipeline, call.arguments)
        for call, arguments in refined:
            self._teach(call.embedding)
            self._encode_prompt(self._refiner, arguments)
        for call in self._calls:
            if call.arguments.get("image") is not None:
                self._encode_image(call.arguments)
        for call in self._calls:
            self._denoise(self._pipeline, call, call.arguments)
        for call, arguments in refined:
            self._denoise(self._refiner, call, {**arguments, "image": call.latents})

    def _denoise(self, pipeline: Any, call: Call, arguments: dict[str, Any]) -> None:
        title = call.title if pipeline is self._pipeline else f"{call.title}, refiner"
        with self._bar(title) as progress:
            made = pipeline(**{**arguments, "output_type": "latent"}, progress=progress)
        call.latents = made.images
        self._after(pipeline, True)

    def decode(self, call: Call) -> list[Any]:
        """A call's pictures."""
        pipeline = self._pipeline if call.refine is None else self._refiner
        made: list[Any] = pipeline.decode(call.latents)
        call.latents = None
        self._after(pipeline, False)
        return made

    def _encode_prompt(self, pipeline: Any, arguments: dict[str, Any]) -> None:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        made = pipeline.encode_prompt(
            arguments.pop("prompt"),
            negative_prompt=arguments.pop("negative_prompt"),
            do_classifier_free_guidance=arguments["guidance_scale"] > 1,
            width=arguments["width"],
            height=arguments["height"],
        )
        arguments.update(zip(names, made, strict=True))
        self._after(pipeline, False)

    def _encode_image(self, arguments: dict[str, Any]) -> None:
        arguments["image"] = self._pipeline.encode_start_image(
            arguments["image"],
            len(arguments["generator"]),
            arguments["prompt_embeds"].dtype,
            arguments["generator"],
            width=arguments["width"],
            height=arguments["height"],
        )
        self._after(self._pipeline, False)
