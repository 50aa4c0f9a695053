"""The tiny model's tokenizers: CLIP's byte-pair format over a vocabulary of 1024.

The pieces are CLIP's: lower case, CLIP's word pattern, byte-level symbols, `</w>` at a word's end. All 256 bytes are
in the vocabulary, so any text in any script is encoded; words of the tiny model's world are one token each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from training.architecture import TOKENS, VOCAB_SIZE

START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

# A little everyday English, so that a prompt outside of the world is not spelled letter by letter.
ENGLISH = [
    "a",
    "an",
    "the",
    "of",
    "to",
    "and",
    "in",
    "is",
    "it",
    "you",
    "that",
    "he",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
    "one",
    "had",
    "not",
    "but",
    "what",
    "all",
    "were",
    "when",
    "we",
    "there",
    "can",
    "your",
    "which",
    "their",
    "said",
    "if",
    "do",
    "will",
    "each",
    "about",
    "how",
    "up",
    "out",
    "them",
    "then",
    "she",
    "many",
    "some",
    "so",
    "these",
    "would",
    "other",
    "into",
    "has",
    "more",
    "her",
    "two",
    "like",
    "him",
    "see",
    "time",
    "could",
    "no",
    "make",
    "than",
    "first",
    "been",
    "its",
    "who",
    "now",
    "people",
    "my",
    "made",
    "over",
    "did",
    "down",
    "only",
    "way",
    "find",
    "use",
    "may",
    "water",
    "long",
    "little",
    "very",
    "after",
    "words",
    "called",
    "just",
    "where",
    "most",
    "know",
    "get",
    "through",
    "back",
    "much",
    "before",
    "go",
    "good",
    "new",
    "write",
    "our",
    "used",
    "me",
    "man",
    "too",
    "any",
    "day",
    "same",
    "right",
    "look",
    "think",
    "also",
    "around",
    "another",
    "came",
    "come",
    "work",
    "three",
    "word",
    "must",
    "because",
    "does",
    "part",
    "even",
    "place",
    "well",
    "such",
    "here",
    "take",
    "why",
    "things",
    "help",
    "put",
    "years",
    "different",
    "away",
    "again",
    "off",
    "went",
    "old",
    "number",
    "great",
    "tell",
    "men",
    "say",
    "small",
    "every",
    "found",
    "still",
    "between",
    "name",
    "should",
    "home",
    "big",
    "give",
    "air",
    "line",
    "set",
    "own",
    "under",
    "read",
    "last",
    "never",
    "us",
    "left",
    "end",
    "along",
    "while",
    "might",
    "next",
    "sound",
    "below",
    "saw",
    "something",
    "thought",
    "both",
    "few",
    "those",
    "always",
    "looked",
    "show",
    "large",
    "often",
    "together",
    "asked",
    "house",
    "world",
    "photo",
    "picture",
    "painting",
    "portrait",
    "drawing",
    "astronaut",
    "cat",
    "dog",
    "horse",
    "mountain",
    "city",
    "street",
    "beautiful",
    "detailed",
    "quality",
    "blurry",
    "low",
    "bad",
    "worst",
    "ugly",
    "text",
    "watermark",
    "noisy",
    "dark",
    "light",
    "sky",
    "sea",
    "forest",
    "tree",
    "flower",
    "woman",
    "face",
    "hand",
    "hat",
    "night",
    "sunset",
    "style",
    "art",
]


def train(captions: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges from captions (and a little English), whatever their order.

    Plain byte-pair encoding (Sennrich et al. 2016) with ties broken by spelling: the trainer in `tokenizers` breaks
    them differently from run to run.
    """
    alphabet = _byte_symbols()
    symbols = alphabet + [symbol + "</w>" for symbol in alphabet]
    # As in CLIP: bytes, bytes at a word's end, merges in order, the two specials last (the end has the highest id).
    room = VOCAB_SIZE - len(symbols) - 2
    # English counts little beside the captions.
    words = {(*word[:-1], word[-1] + "</w>"): count for word, count in _count([*captions, *ENGLISH * 2]).items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < room:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            raise ValueError(f"{len(merges)} merges in the corpus; a vocabulary of {VOCAB_SIZE} needs {room}")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merged(word, best): count for word, count in words.items()}
    entries = symbols + [first + second for first, second in merges] + [START, END]
    if len(set(entries)) != VOCAB_SIZE:
        raise ValueError("two merges give the same token")
    return {entry: number for number, entry in enumerate(entries)}, merges


def _count(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, in CLIP's splitting and byte alphabet."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    return counts


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    found: list[str] = []
    at = 0
    while at < len(word):
        together = word[at : at + 2] == pair
        found.append(word[at] + word[at + 1] if together else word[at])
        at += 2 if together else 1
    return tuple(found)


def write(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """`folder/tokenizer` (pads with <|endoftext|>) and `folder/tokenizer_2` (pads with "!"), as SDXL's."""
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
        lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
        (place / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        (place / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
        config = {**special, "add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
        config |= {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"}
        (place / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins of CLIP's byte alphabet, in CLIP's order ("!" is 0)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(rest))]
