"""Textual inversion at run time on a compiled micro SDXL, against diffusers' ``load_textual_inversion``.

Bound: latents differ by at most 1e-3 of their standard deviation (max abs). The text encoders run in eager mode, on the
weights files that a build with spare rows has: compiling them takes long, and CI has little time.
"""

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

import runtimes
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from runtimes import embedding_files
from runtimes.embedding_files import Embedding
from runtimes.jobs import Job
from runtimes.names import Names
from runtimes.pipeline import Pipeline
from runtimes.session import Planner, Session
from tests import spare_rows
from tests.runtimes.stand_in import stand_in_manifest
from tests.runtimes.test_parity import difference, seeds

BOUND = 1e-3
CALL = {"num_inference_steps": 6, "output_type": "latent"}
WIDTHS = (16, 24)


def write(path: Path, count: int, seed: int, names: tuple[str, str] = ("clip_l", "clip_g"), flat: bool = False) -> Path:
    """A file of ``count`` random vectors for each of the micro model's text encoders."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(count, width, generator=generator) for name, width in zip(names, WIDTHS, strict=True)}
    save_file({name: tensor[0] if flat else tensor for name, tensor in made.items()}, path)
    return path


# Files, and what is refused before anything is loaded.


def micro_manifest(spare: int) -> Any:
    made = stand_in_manifest(options={"spare_tokens": spare} if spare else {})
    configs = {"text_encoder": {"hidden_size": 16}, "text_encoder_2": {"hidden_size": 24}}
    return msgspec.structs.replace(made, key=msgspec.structs.replace(made.key, configs=configs))


def test_a_word_is_named_or_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "style.safetensors", 1, 1)
    assert embedding_files.parse(str(path)) == Embedding(path, "style")
    named = embedding_files.parse(f"{path}:<s>")
    assert named == Embedding(path, "<s>") and embedding_files.parse(str(named)) == named
    for text, said in ((f"{path}:two words", "can't be the word"), (f"{tmp_path}/none.safetensors", "does not exist")):
        with pytest.raises(SdxlError, match=said):
            embedding_files.parse(text)


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_forms_of_files(tmp_path: Path, names: tuple[str, str]) -> None:
    found = embedding_files.read(Embedding(write(tmp_path / "a.safetensors", 3, 1, names), "a"))
    assert [(v.key, v.count, v.width) for v in found.values()] == [(names[0], 3, 16), (names[1], 3, 24)]
    flat = embedding_files.read(Embedding(write(tmp_path / "b.safetensors", 1, 1, names, flat=True), "b"))
    assert [v.count for v in flat.values()] == [1, 1]


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "pickle.pt").write_bytes(b"PK")
    save_file({"emb_params": torch.zeros(1, 16)}, tmp_path / "old.safetensors")
    save_file({"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(2, 24)}, tmp_path / "uneven.safetensors")
    for name, said in (
        ("pickle.pt", "Pickles"),
        ("old.safetensors", "clip_l"),
        ("uneven.safetensors", "1 and 2 vectors"),
    ):
        with pytest.raises(SdxlError, match=said):
            embedding_files.read(Embedding(tmp_path / name, "a"))


def test_room_for_them(tmp_path: Path) -> None:
    two = Embedding(write(tmp_path / "a.safetensors", 2, 1), "a")
    embedding_files.check([two], micro_manifest(2))
    embedding_files.check([], micro_manifest(0))
    with pytest.raises(SdxlError, match="would need 2 spare rows in its word tables, and has 0") as caught:
        embedding_files.check([two], micro_manifest(0))
    assert caught.value.hint.endswith("--spare-tokens 2")
    with pytest.raises(SdxlError, match="would need 4 spare rows"):
        embedding_files.check([two, Embedding(two.path, "b")], micro_manifest(3))
    with pytest.raises(SdxlError, match="Two embeddings are the word 'a_1'"):
        embedding_files.check([two, Embedding(two.path, "a_1")], micro_manifest(9))
    other = micro_manifest(2)
    other.key.configs["text_encoder_2"]["hidden_size"] = 1280
    with pytest.raises(SdxlError, match="vectors for text_encoder_2 have 24 numbers, tiny's 1280"):
        embedding_files.check([two], other)


def test_the_command_line_refuses_before_anything_is_loaded(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from runtimes import cli
    from tests.runtimes.stand_in import stand_in_artifact

    words = ["--engine", str(stand_in_artifact(tmp_path / "artifact")), "--prompt", "a", "--embedding"]
    path = write(tmp_path / "a.safetensors", 1, 1)
    for value, said in ((str(path), "would need 1 spare rows"), (f"{path}x", "does not exist")):
        done = CliRunner().invoke(cli.command, [*words, value])
        assert isinstance(done.exception, SdxlError) and said in str(done.exception)


def test_a_refiner_has_to_know_the_words_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", 1, 1)
    options = Job(prompt="", seed=1, steps=6, guidance=5.0, guidance_until=1.0, num_images=1, embedding=(str(path),))
    for spare in (1, 0):
        second = micro_manifest(spare)
        second = msgspec.structs.replace(second, key=msgspec.structs.replace(second.key, model="second"))
        planner = Planner([micro_manifest(1)], options, Names(str(tmp_path) + "/"), "resident", [second])
        if spare:
            assert planner.plan([Job(prompt="a")])[0].parameters.embedding == (f"{path}:a",)
        else:
            with pytest.raises(SdxlError, match="second would need 1 spare rows"):
                planner.plan([Job(prompt="a")])


# From here on with engines.


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("embeddings") / "one.safetensors", 1, 1)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("embeddings") / "three.safetensors", 3, 2)


@pytest.fixture(scope="module")
def theirs(micro_model: Path, one: Path, three: Path) -> Any:
    """diffusers with both files loaded, as ``<one>`` and ``Three``."""
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import load_file

    pipeline = StableDiffusionXLPipeline.from_pretrained(micro_model, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    for path, token in ((one, "<one>"), (three, "Three")):
        state = load_file(path)
        for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipeline, f"text_encoder{suffix}"), getattr(pipeline, f"tokenizer{suffix}")
            pipeline.load_textual_inversion(state[name], token=token, text_encoder=encoder, tokenizer=tokenizer)
    return pipeline


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, micro_artifact: Path, micro_model: Path) -> Iterator[Path]:
    """The micro model with six spare rows."""
    folder = tmp_path_factory.mktemp("spare") / "artifact"
    with pytest.MonkeyPatch.context() as patch:
        spare_rows.run_in_eager_mode(patch, folder, micro_model)
        yield spare_rows.write(folder, micro_artifact, micro_model, 6)


@pytest.fixture(scope="module")
def ours(artifact: Path) -> Pipeline:
    return runtimes.load(artifact)


@pytest.fixture(autouse=True)
def unloaded(request: pytest.FixtureRequest) -> None:
    if "ours" in request.fixturenames:
        request.getfixturevalue("ours").unload_textual_inversion()


def draw(pipeline: Any, prompt: str, **arguments: Any) -> torch.Tensor:
    made: torch.Tensor = pipeline(prompt, generator=seeds(1), **CALL, **arguments).images
    return made


PROMPTS = (
    "a red <one> circle",
    "three, a Three above a <one>",
    "a red circle",
    "threetwo <one><one>",
    "circle " * 80 + "<one>",
)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_latents_are_those_of_diffusers(ours: Pipeline, theirs: Any, one: Path, three: Path, prompt: str) -> None:
    ours.load_textual_inversion(one, "<one>")
    ours.load_textual_inversion(three, "Three")
    negative = {"negative_prompt": "Three"}
    assert difference(draw(ours, prompt, **negative), draw(theirs, prompt, **negative)) <= BOUND


@pytest.mark.slow
def test_words_come_and_go_bit_by_bit(ours: Pipeline, micro_artifact: Path, one: Path, three: Path) -> None:
    prompt = "a red <one> circle and three"
    plain = draw(ours, prompt)
    assert difference(plain, draw(runtimes.load(micro_artifact), prompt)) <= BOUND  # spare rows change nothing
    there = ours.artifacts[0]
    before = {
        name: {k: t.clone() for k, t in there.tensors(name).items()} for name in ("text_encoder", "text_encoder_2")
    }
    ours.load_textual_inversion(one, "<one>")
    first = draw(ours, prompt)
    assert difference(first, plain) > 2 * BOUND
    ours.set_embeddings([Embedding(three, "<one>")])
    assert difference(draw(ours, prompt), first) > 2 * BOUND
    ours.set_embeddings([Embedding(one, "<one>")])
    assert torch.equal(draw(ours, prompt), first)
    ours.unload_textual_inversion()
    assert all(torch.equal(t, before[name][k]) for name in before for k, t in there.tensors(name).items())
    assert torch.equal(draw(ours, prompt), plain)


@pytest.mark.slow
def test_words_that_cannot_be(ours: Pipeline, one: Path, three: Path) -> None:
    with pytest.raises(SdxlError, match="'red</w>' is a word of text_encoder already"):
        ours.load_textual_inversion(one, "red</w>")
    ours.load_textual_inversion(three)
    ours.load_textual_inversion(one)
    known = draw(ours, "a three and a one")
    with pytest.raises(SdxlError, match="would need 7 spare rows"):
        ours.load_textual_inversion(three, "<four>")
    assert torch.equal(draw(ours, "a three and a one"), known)  # what was known still is


@pytest.mark.slow
@pytest.mark.skipif("SDXL_TEST_ARTIFACTS" not in os.environ, reason="compiles for half a minute, and nothing is kept")
def test_what_is_really_built(
    micro_artifact: Path, theirs: Any, one: Path, three: Path, request: pytest.FixtureRequest
) -> None:
    micro_spare_artifact: Path = request.getfixturevalue("micro_spare_artifact")
    ours, unlike = runtimes.load(micro_spare_artifact), runtimes.load(micro_artifact)
    for prompt in PROMPTS:
        ours.set_embeddings([Embedding(one, "<one>"), Embedding(three, "Three")])
        assert difference(draw(ours, prompt), draw(theirs, prompt)) <= BOUND
        ours.set_embeddings([])
        assert torch.equal(draw(ours, prompt), draw(unlike, prompt))
    spare, plain = (manifests.read(path) for path in (micro_spare_artifact, micro_artifact))
    same = {n for n, c in spare.components.items() if c.code_key == plain.components[n].code_key}
    assert same == {"unet", "vae_decoder"}
    assert (micro_spare_artifact / "weights/unet.safetensors").samefile(micro_artifact / "weights/unet.safetensors")
    assert "--spare-tokens" in spare.command


@pytest.mark.slow
def test_a_run_with_words_by_line_staged_and_resident(artifact: Path, one: Path, three: Path, tmp_path: Path) -> None:
    options = Job(prompt="", seed=1, steps=6, guidance=5.0, guidance_until=1.0, num_images=1)
    asked = [
        Job(prompt="a red <one>", embedding=(f"{one}:<one>",)),
        Job(prompt="a red <one>"),
        Job(prompt="a red <one>", embedding=(f"{three}:<one>",), seed=1),
    ]
    drawn = {}
    for mode in ("resident", "staged"):
        planner = Planner([manifests.read(artifact)], options, Names(str(tmp_path / mode) + "/"), mode)
        session = Session(runtimes.load(artifact, memory=mode), lambda title: nullcontext())
        pictures = [*session.render(planner.plan(asked))]
        drawn[mode] = [picture.path.read_bytes() for picture in pictures]
        assert json.loads(msgspec.json.encode(pictures[0].parameters))["embedding"] == [f"{one}:<one>"]
    assert drawn["resident"] == drawn["staged"] and len(set(drawn["staged"])) == 3
