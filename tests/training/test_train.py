"""Every stage runs a few steps, a broken run goes on, and what comes out is a model that diffusers loads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import architecture, tokens
from training.captions import describe, read
from training.data import SQUARE, Captions, bucket_of, draw, encode, example, load_tokenizer, spoilt, targets_of
from training.learner import Learner, seeded_steps
from training.logbook import Logbook
from training.plan import SMOKE, Plan
from training.train import corpus, train
from training.world import Scene, is_held_out

PLAN = replace(
    SMOKE,
    pictures=10,
    vae_steps=2,
    vae_tiny_steps=1,
    text_steps=1,
    unet_steps=2,
    doubt_steps=1,
    sheet_every=2,
    score_prompts=1,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training")
    train(out, PLAN, torch.device("cpu"))
    return out


def test_every_stage_leaves_its_mark(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    stages = {row["stage"] for row in rows}
    assert stages >= {"vae", "vae_tiny", "text", "unet", "doubt", "refiner", "done"}
    assert {path.name for path in (trained / "sheets").glob("*.png")} == {
        "vae-00002.png",
        "vae_tiny-00001.png",
        "unet-000002.png",
        "unet-000002-unguided.png",
        "doubt-000001.png",
        "doubt-000001-unguided.png",
        "refiner-00002.png",
    }
    assert {path.stem for path in (trained / "checkpoints").iterdir()} == {
        "vae",
        "scaling_factor",
        "vae_tiny",
        "text",
        "unet",
        "doubt",
        "refiner",
    }


def test_a_finished_model_goes_on_with_doubt(trained: Path, tmp_path: Path) -> None:
    begin = trained / "model"
    train(tmp_path, PLAN, torch.device("cpu"), begin)
    stages = {json.loads(line)["stage"] for line in (tmp_path / "log.jsonl").read_text().splitlines()}
    assert "doubt" in stages and not stages & {"vae", "vae_tiny", "text", "unet"}
    one, two = (json.loads((model / "vae" / "config.json").read_text()) for model in (begin, tmp_path / "model"))
    assert one["scaling_factor"] == two["scaling_factor"] != architecture.VAE["scaling_factor"]
    for name, kept in (("vae", True), ("vae_tiny", True), ("unet", False), ("tokenizer_2", True)):
        file = "vocab.json" if name.startswith("tokenizer") else "diffusion_pytorch_model.safetensors"
        same = (begin / name / file).read_bytes() == (tmp_path / "model" / name / file).read_bytes()
        assert same == kept, name
    average = torch.load(tmp_path / "checkpoints" / "doubt.pt")["average"]["unet"]
    before, after = (load_file(m / "unet" / "diffusion_pytorch_model.safetensors") for m in (begin, tmp_path / "model"))
    learned, stayed = (torch.cat([(to[n] - before[n]).float().flatten() for n in before]) for to in (average, after))
    assert float(learned @ stayed / (learned @ learned)) == pytest.approx(PLAN.doubt_share, abs=0.1)


def test_a_finished_stage_is_not_done_again(trained: Path) -> None:
    (trained / "checkpoints" / "refiner.pt").unlink()
    before = (trained / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    log = trained / "log.jsonl"
    log.unlink()
    train(trained, PLAN, torch.device("cpu"))
    stages = [json.loads(line)["stage"] for line in log.read_text().splitlines()]
    assert "refiner" in stages
    assert "text" not in stages
    assert (trained / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_the_model_loads_in_diffusers(trained: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(trained / "model")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red circle", num_inference_steps=1, output_type="np").images[0]
    assert picture.shape == (256, 256, 3)


class Line(torch.nn.Module):
    """A stand-in for a network: one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))


def fit(out: Path, steps: int, stop: int) -> tuple[torch.Tensor, list[int]]:
    """Learn `weight` towards steps of a fixed random walk; stop early at `stop`, with a checkpoint."""
    line = Line()
    target = torch.tensor([1.0, -2.0, 0.5])

    def loss(live: dict[str, torch.nn.Module], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (live["line"].weight - target * inputs["scale"]).square().sum()

    plan = Plan(bf16=False, graphs=False, warmup=2, seed=3)
    learner = Learner("line", {"line": line}, {"line": 0.1}, loss, steps, plan, out, torch.device("cpu"))
    done = []
    for step in seeded_steps(learner, 1):
        if step == stop:
            return line.weight.detach().clone(), done
        learner.checkpoint.every_seconds = 0.0
        learner(step, {"scale": torch.tensor(1.0 + step / 10)})
        done.append(step)
    learner.finish()
    return line.weight.detach().clone(), done


def test_a_resumed_run_is_the_whole_run(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", 12, stop=99)
    _, first = fit(tmp_path / "broken", 12, stop=5)
    resumed, second = fit(tmp_path / "broken", 12, stop=99)
    assert (first, second) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11])
    assert torch.equal(whole, resumed)
    again, third = fit(tmp_path / "broken", 12, stop=99)
    assert third == []
    assert torch.equal(again, resumed)


def test_captions_depend_on_the_step_alone(trained: Path) -> None:
    whole = Captions(trained / "model", 7, 100, 3, range(0, 6))
    rest = Captions(trained / "model", 7, 100, 3, range(4, 6))
    for number in range(2):
        assert torch.equal(whole[4 + number].ids, rest[number].ids)
        assert torch.equal(whole[4 + number].numbers, rest[number].numbers)


@pytest.mark.parametrize("wrong", [0.0, 0.2, 1.0])
def test_as_many_captions_are_wrong_as_asked(trained: Path, wrong: float) -> None:
    """Read what is said back from the ids: contradicts the picture, or doesn't, and never names a held-out triple."""
    captions = Captions(trained / "model", 7, 100_000, 200, range(0, 8), empty=0.1, wrong=wrong)
    tokenizer = load_tokenizer(trained / "model")
    said = mistaken = 0
    for step in range(len(captions)):
        words = captions[step]
        for ids, number in zip(words.ids, words.numbers.tolist(), strict=True):
            scene, _ = example(7, number)
            heard = read(tokenizer.decode(ids, skip_special_tokens=True))
            assert not is_held_out(heard)
            if heard.things and (ids == tokenizer.eos_token_id).sum() > 1:  # said, and not cut short
                said += 1
                mistaken += not agrees(heard, scene)
            assert heard.background in (None, scene.background)
    assert said == pytest.approx(0.9 * 1600, rel=0.05)
    # A few mistakes go unsaid, a changed place above all.
    assert wrong * 0.95 - 0.03 * (0 < wrong < 1) <= mistaken / said <= wrong + 0.03 * (0 < wrong < 1)


def agrees(heard: Scene, scene: Scene) -> bool:
    return len(heard.things) == len(scene.things) and all(
        thing in (drawn, replace(drawn, place=None)) for thing, drawn in zip(heard.things, scene.things, strict=True)
    )


def test_targets_are_what_the_caption_says(trained: Path) -> None:
    captions = Captions(trained / "model", 7, 100_000, 50, range(0, 4), wrong=0.5, complete=True)
    tokenizer = load_tokenizer(trained / "model")
    unlike = 0
    for step in range(len(captions)):
        words = captions[step]
        for ids, targets, number in zip(words.ids, words.targets.tolist(), words.numbers.tolist(), strict=True):
            heard = read(tokenizer.decode(ids, skip_special_tokens=True))
            assert targets_of(heard) == targets
            unlike += targets != targets_of(example(7, number)[0])
    assert 60 < unlike < 140


def test_buckets_have_their_shares() -> None:
    numbers = [bucket_of(number) for number in range(2000)]
    assert [numbers.count(bucket) / 2000 for bucket in range(3)] == [0.15, 0.15, 0.7]
    assert {bucket_of(number) for number in range(10)} == {0, 1, 2}


def test_an_example_is_of_its_steps_bucket(trained: Path) -> None:
    captions = Captions(trained / "model", 7, 100, 3, range(0, 20))
    for step in range(20):
        words = captions[step]
        assert words.bucket == bucket_of(step)
        assert {bucket_of(number) for number in words.numbers.tolist()} == {words.bucket}


def test_a_spoilt_picture_is_blurred_and_keeps_its_colours() -> None:
    examples = [example(2, number) for number in range(400) if bucket_of(number) == SQUARE]
    spoilt_ones = [(scene, spoilt(view, 2, number)) for number, (scene, view) in enumerate(examples)]
    harmed = [n for n, (_, view) in enumerate(spoilt_ones) if view.harm]
    assert 0.4 < len(harmed) / len(examples) < 0.6
    some = harmed[:12]
    before = draw([examples[n] for n in some], SQUARE, "cpu")
    after = draw([spoilt_ones[n] for n in some], SQUARE, "cpu")
    assert (after.mean((2, 3)) - before.mean((2, 3))).abs().max() < 0.01
    assert all(
        (a.diff(dim=2).square().mean() < 0.9 * b.diff(dim=2).square().mean())
        for a, b in zip(after, before, strict=True)
    )
    low = [view.score < 5 for _, view in spoilt_ones]
    as_harmed = sum(is_low == bool(view.harm) for is_low, (_, view) in zip(low, spoilt_ones, strict=True)) / len(low)
    assert 0.75 < as_harmed < 0.97


def test_a_log_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"stage": "vae", "seconds": 40.5}\n{"stage": "va')
    Logbook(tmp_path).write("vae", step=1)
    assert 40.5 <= json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["seconds"] < 45


def test_tokenizers_encode_anything(trained: Path) -> None:
    from transformers import CLIPTokenizer

    first = load_tokenizer(trained / "model")
    second = CLIPTokenizer.from_pretrained(trained / "model" / "tokenizer_2")
    for text in ["a red circle", "Été à la plage, ¿qué tal? 日本 🙂", "", "x" * 400]:
        ids, ids_2 = encode(first, [text])
        kind = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        assert torch.equal(second([text], **kind).input_ids, ids_2)
        assert ids[0, 0] == architecture.VOCAB_SIZE - 2
        assert ids.max() == architecture.VOCAB_SIZE - 1 == first.eos_token_id
        body = [token for token in ids[0].tolist() if token < architecture.VOCAB_SIZE - 2]
        if len(body) < 75:
            assert first.decode(body).replace(" ", "") == text.lower().replace(" ", "")


def test_tokenizers_are_made_from_the_captions_alone() -> None:
    assert tokens.train(corpus(300)) == tokens.train(reversed(corpus(300)))


def test_a_caption_fits_the_encoders() -> None:
    import random

    from training import world

    folder = Path(__file__).parents[2] / "buildtool" / "data" / "tiny"
    tokenizer = load_tokenizer(folder)
    lengths = []
    for number in range(500):
        rng = random.Random(f"length {number}")
        lengths.append(len(tokenizer(describe(world.sample(rng), rng)).input_ids))
    assert sum(length > 77 for length in lengths) / len(lengths) < 0.02
