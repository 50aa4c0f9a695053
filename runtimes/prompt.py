"""Prompts to token ids, without transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Encoding
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
        self._path, self._words = path, frozenset[str]()
        self._backend = self._load()

    def _load(self) -> Backend:
        path = self._path
        again = "Build the artifact again, or look at it with: sdxl-build verify"
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise SdxlError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}.", again) from None
        padding, truncation = backend.padding, backend.truncation
        if not padding or not truncation or padding["length"] != truncation["max_length"]:
            raise SdxlError(f"{path} does not say to how many tokens prompts are padded and cut.", again)
        self.max_length = truncation["max_length"]
        return backend

    def knows(self, word: str) -> bool:
        """Whether a word is in the vocabulary."""
        return self._backend.token_to_id(word) is not None

    def learn(self, words: Sequence[str]) -> int:
        """Gives these words, and no others beside its own, ids of their own, one after the other.

        A prompt's ``w`` is then all of ``w``, ``w_1``, ``w_2``, … that there are.

        Returns:
            The first one's id.
        """
        if self._words or words:
            self._backend = self._load()
        first = self._backend.get_vocab_size()
        self._backend.add_tokens([AddedToken(word, normalized=True) for word in words])
        self._words = frozenset(words)
        return first

    def _spelled_out(self, prompt: str) -> str:
        """Every new word in a prompt followed by its further ones (diffusers' ``maybe_convert_prompt``)."""
        for word in sorted(self._words.intersection(self._backend.encode(prompt).tokens)):
            number, all_of_it = 1, word
            while f"{word}_{number}" in self._words:
                all_of_it += f" {word}_{number}"
                number += 1
            prompt = prompt.replace(word, all_of_it)
        return prompt

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
        if self._words:
            prompts = [self._spelled_out(prompt) for prompt in prompts]
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
