"""Every stage runs a few steps, a broken run goes on, and what comes out is a model that diffusers loads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training import architecture, tokens
from training.captions import describe
from training.data import Captions, encode, load_tokenizer
from training.learner import Learner, seeded_steps
from training.plan import SMOKE, Plan
from training.train import corpus, train

PLAN = replace(
    SMOKE, pictures=10, vae_steps=2, vae_tiny_steps=1, text_steps=1, unet_steps=2, sheet_every=2, score_prompts=1
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training")
    train(out, PLAN, torch.device("cpu"))
    return out


def test_every_stage_leaves_its_mark(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    stages = {row["stage"] for row in rows}
    assert stages >= {"vae", "vae_tiny", "text", "unet", "refiner", "done"}
    assert {path.name for path in (trained / "sheets").glob("*.png")} == {
        "vae-00002.png",
        "vae_tiny-00001.png",
        "unet-000002.png",
    }
    assert {path.stem for path in (trained / "checkpoints").iterdir()} == {
        "vae",
        "scaling_factor",
        "vae_tiny",
        "text",
        "unet",
        "refiner",
    }


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
