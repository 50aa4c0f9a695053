"""Prompts and sizes to the UNet's conditions, as diffusers' ``encode_prompt`` and ``_get_add_time_ids``."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from runtimes.artifact import Artifact
from runtimes.prompt import Tokenizer

log = logging.getLogger("runtimes")

Encoded = tuple[Tensor, Tensor]
"""Hidden states (77, D) of both encoders side by side, and the pooled embedding (P,)."""


class PromptEncoder:
    """Both text encoders of an artifact, with their tokenizers. Equal prompts are encoded once a call."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._tokenizers = [Tokenizer(artifact.folder / f"{n}.json") for n in ("tokenizer", "tokenizer_2")]

    def __call__(self, prompts: Sequence[tuple[str, str]]) -> Encoded:
        """Encodes (prompt, prompt_2) pairs: (N, 77, D) and (N, P)."""
        known: dict[tuple[str, str], Encoded] = {}
        for pair in prompts:
            if pair not in known:
                known[pair] = self._encode(pair)
        return torch.stack([known[p][0] for p in prompts]), torch.stack([known[p][1] for p in prompts])

    def _encode(self, pair: tuple[str, str]) -> Encoded:
        ids = []
        for tokenizer, text in zip(self._tokenizers, pair, strict=True):
            tokens, cut = tokenizer.encode([text])
            ids.append(tokens.to(self._artifact.device))
            if cut[0] and not (ids[1:] and pair[0] == pair[1]):
                limit = self._artifact.manifest.pipeline.max_prompt_tokens
                log.warning("The prompt is cut at %d tokens; left out: %r", limit, cut[0])
        (first,) = self._artifact.engine("text_encoder")(input_ids=ids[0])
        second, pooled = self._artifact.engine("text_encoder_2")(input_ids=ids[1])
        return torch.cat([first, second], dim=-1)[0], pooled[0].clone()


def time_ids(
    original_size: tuple[int, int], crops_coords_top_left: tuple[int, int], target_size: tuple[int, int]
) -> Tensor:
    """SDXL's micro-conditioning (1, 6): sizes are (height, width) in pixels, as diffusers has them."""
    return torch.tensor([[*original_size, *crops_coords_top_left, *target_size]], dtype=torch.float32)
