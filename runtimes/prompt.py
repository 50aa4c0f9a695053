"""Prompts to token ids, without transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from buildtool.store.errors import SdxlError


class Tokenizer:
    """A CLIP tokenizer from the artifact's tokenizer.json, which carries its own padding and truncation.

    Args:
        path: the tokenizer.json that ``sdxl-build`` wrote.

    Raises:
        SdxlError: the file is missing, damaged, or pads and truncates to no one length.
    """

    max_length: int
    """Tokens of every encoded prompt, the first and the last one included."""

    def __init__(self, path: Path) -> None:
        again = "Build the artifact again, or look at it with: sdxl-build verify"
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise SdxlError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}.", again) from None
        padding, truncation = self._backend.padding, self._backend.truncation
        if not padding or not truncation or padding["length"] != truncation["max_length"]:
            raise SdxlError(f"{path} does not say to how many tokens prompts are padded and cut.", again)
        self.max_length = truncation["max_length"]

    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
        """Token ids, and what didn't fit.

        Returns:
            int64 CPU tensor of shape (len(prompts), max_length), and for each prompt the end of it
            that was cut, as it was written; "" where all of it fits.

        Raises:
            SdxlError: a prompt is not valid Unicode.
        """
        for prompt in prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair, from a broken command line or JSON
                raise SdxlError(f"The prompt is not valid Unicode text: {error.reason}.") from None
        encodings = [self._backend.encode(prompt) for prompt in prompts]
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        cut = [_cut(prompt, encoding) for prompt, encoding in zip(prompts, encodings, strict=True)]
        return ids.view(len(prompts), self.max_length), cut


def _cut(prompt: str, encoding: Encoding) -> str:
    if not encoding.overflowing:
        return ""
    # Tokens that the tokenizer added (first, last, padding) have empty ranges.
    starts = [start for rest in encoding.overflowing for start, end in rest.offsets if end > start]
    return prompt[min(starts) :].strip() if starts else ""
