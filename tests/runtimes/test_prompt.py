"""The artifact's tokenizers against transformers': the same ids for any prompt, however it is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from buildtool.store.errors import SdxlError
from buildtool.tokenizers import convert
from runtimes.prompt import Tokenizer

TINY = Path(__file__).parents[2] / "buildtool" / "data" / "tiny"

PROMPTS = [
    "",
    " ",
    "!",
    "wow!! a cat!",
    "! !!x! ?!",
    "cat!dog",
    "A Photo of an ASTRONAUT riding a horse, 4K",
    "naïve café Ångström ÉCOLE",
    "cafe\u0301 e\u0301cole",
    "a 🦊 and 👩‍🚀 in 漢字 и кириллица ﬁn",
    "line one\nline two\r\n\tthree",
    "  \u00a0weird\u2003white\u200bspace\u3000 ",
    "don't it's we'll I'd you've I'm they're",
    "3.14, 2024-11-23 (masterpiece:1.2) [x] {y} <lora:z>",
    "<|startoftext|> inside <|endoftext|> the text <|EndOfText|>",
    "\x00control\x07 characters",
    "red " * 75,
    "red " * 76,
    "red! " * 60,
    "!" * 76 + "?",
    "a very long prompt about foxes " * 30 + "that ends with a castle!",
    "🦊" * 60,
]


def clip_folder(folder, pad):
    """A small CLIP-format tokenizer: CLIP's byte alphabet in its order ("!" is id 0) and some merges."""
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in codes] + [chr(256 + i) for i in range(256 - len(codes))]
    merges = [
        "r e",
        "re d</w>",
        "a s",
        "as t",
        "t h",
        "th e</w>",
        "f o",
        "x e",
        "xe s</w>",
        "c a",
        "ca t</w>",
        "! !</w>",
    ]
    tokens = [*letters, *[c + "</w>" for c in letters], *[m.replace(" ", "") for m in merges]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")

    def token(content):
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    names = {"bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>")}
    names |= {"unk_token": token("<|endoftext|>"), "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    typed = {k: v if isinstance(v, str) else {"__type": "AddedToken", **v} for k, v in names.items()}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, **typed, "tokenizer_class": "CLIPTokenizer"}), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module", params=["<|endoftext|>", "!", TINY / "tokenizer", TINY / "tokenizer_2"])
def folder(request, tmp_path_factory):
    if isinstance(request.param, Path):
        return request.param
    return clip_folder(tmp_path_factory.mktemp("source") / "tokenizer", request.param)


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "tokenizer.json"
    convert(folder, out)
    return Tokenizer(out)


def theirs(folder, prompts):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_transformers(folder, converted, prompt):
    ids, _ = converted.encode([prompt])
    assert ids.dtype == torch.int64 and ids.shape == (1, 77)
    assert torch.equal(ids, theirs(folder, [prompt]))


def test_a_batch_is_its_prompts_one_by_one(folder, converted):
    ids, cut = converted.encode(PROMPTS)
    assert ids.shape == (len(PROMPTS), 77) and len(cut) == len(PROMPTS)
    assert torch.equal(ids, theirs(folder, PROMPTS))
    assert converted.encode([])[0].shape == (0, 77)


def test_an_exclamation_mark_is_the_padding_token_where_the_checkpoint_says_so(folder, converted):
    pad = CLIPTokenizer.from_pretrained(folder).pad_token_id
    (ids,), _ = converted.encode(["red!"])
    assert ids[-1] == pad
    assert (ids[2] == 0) == (pad == 0)  # otherwise "!" ends a word and is another token


def test_a_tokenizer_json_in_the_folder_gives_the_same_ids(folder, converted, tmp_path):
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "merges.txt").exists()
    convert(tmp_path / "saved", tmp_path / "out.json")
    assert torch.equal(Tokenizer(tmp_path / "out.json").encode(PROMPTS)[0], converted.encode(PROMPTS)[0])


def test_what_is_cut_is_named_as_it_was_written(converted):
    kept = "red " * 74
    _, cut = converted.encode([kept + "red Cat  of Öland 🦊! ", kept + "red", ""])
    assert cut == ["Cat  of Öland 🦊!", "", ""]


def test_what_is_cut_is_what_diffusers_names(folder, converted):
    prompt = "a very long prompt about foxes " * 30 + "that ends with a castle"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    untruncated = tokenizer([prompt], padding="longest", return_tensors="pt").input_ids
    (removed,) = tokenizer.batch_decode(untruncated[:, 76:-1])
    assert converted.encode([prompt])[1][0].replace(" ", "") == removed.replace(" ", "")


def test_a_character_cut_in_the_middle_counts_as_cut(converted):
    (ids,), (cut,) = converted.encode(["🦊" * 30])
    assert len(set(ids.tolist())) > 2 and cut.startswith("🦊") and len(cut) in (11, 12)


def test_broken_text_is_refused(converted):
    with pytest.raises(SdxlError, match="not valid Unicode"):
        converted.encode(["fine", "half a pair \ud83e"])


def test_a_damaged_file_is_one_line(folder, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(SdxlError, match="cannot be read"):
        Tokenizer(path)
    path.write_text("{}\n")
    with pytest.raises(SdxlError, match="cannot be read") as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)
    CLIPTokenizer.from_pretrained(folder).backend_tokenizer.save(str(path))
    with pytest.raises(SdxlError, match="how many tokens"):
        Tokenizer(path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_folder_with_a_file_missing_is_refused_by_name(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(SdxlError, match=name):
        convert(tmp_path / "copy", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_folder_with_a_damaged_file_is_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "vocab.json").write_text('{"a": ')
    with pytest.raises(SdxlError, match="cannot be read") as caught:
        convert(tmp_path / "copy", tmp_path / "out.json")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_length_is_refused(folder, tmp_path):
    with pytest.raises(SdxlError, match="77 tokens"):
        convert(folder, tmp_path / "out.json", max_length=64)
