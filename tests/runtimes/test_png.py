import io
import json
import re

import pytest
from PIL import Image

from runtimes import png
from runtimes.jobs import Parameters
from tests.runtimes.stand_in import stand_in_manifest

BASE = {
    "prompt": "a red fox",
    "negative_prompt": None,
    "seed": 7,
    "width": 64,
    "height": 32,
    "steps": 20,
    "guidance": 5.0,
    "guidance_until": 1.0,
    "scheduler": "euler",
}


def written(manifest=None, **settings):
    data = png.encode(Image.new("RGB", (64, 32)), Parameters(**{**BASE, **settings}), manifest or stand_in_manifest())
    return Image.open(io.BytesIO(data))


def parse_as_the_web_ui_does(text):
    """AUTOMATIC1111's ``parse_generation_parameters``, shortened; the regular expression is its own."""
    *lines, last = text.strip().split("\n")
    parameter = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    assert len(parameter.findall(last)) >= 3
    prompt, negative, is_negative = [], [], False
    for line in lines:
        if line.startswith("Negative prompt:"):
            is_negative, line = True, line[16:].strip()
        (negative if is_negative else prompt).append(line)
    settings = {k: json.loads(v) if v.startswith('"') else v for k, v in parameter.findall(last)}
    return "\n".join(prompt), "\n".join(negative), settings


def test_web_uis_read_the_parameters():
    image = written(negative_prompt="blurry", guidance=5.5)
    assert image.info["parameters"].startswith("a red fox\nNegative prompt: blurry\nSteps: 20, Sampler: Euler, ")
    prompt, negative, settings = parse_as_the_web_ui_does(image.info["parameters"])
    assert (prompt, negative) == ("a red fox", "blurry")
    assert settings == {
        "Steps": "20",
        "Sampler": "Euler",
        "CFG scale": "5.5",
        "Seed": "7",
        "Size": "64x32",
        "Model": "tiny",
        "Artifact": stand_in_manifest().key_digest[:12],
    }


@pytest.mark.parametrize("negative", [None, ""])
def test_without_a_negative_prompt_there_is_no_line_for_it(negative):
    assert written(negative_prompt=negative).info["parameters"].split("\n")[1].startswith("Steps: 20")


def test_awkward_text_survives():
    prompt = 'line one\nline two: "quoted", 漢字 🦊, 100%'
    image = written(prompt=prompt, negative_prompt="müde, gräßlich", guidance_until=0.75)
    assert parse_as_the_web_ui_does(image.info["parameters"])[:2] == (prompt, "müde, gräßlich")
    assert parse_as_the_web_ui_does(image.info["parameters"])[2]["Guidance until"] == "0.75"
    own = json.loads(image.info["sdxl-build"])
    assert own["prompt"] == prompt and own["negative_prompt"] == "müde, gräßlich"


def test_a_model_with_separators_in_its_name_is_quoted():
    text = written(stand_in_manifest(model="a, b: c")).info["parameters"]
    assert parse_as_the_web_ui_does(text)[2]["Model"] == "a, b: c"


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [({}, None), ({"use_karras_sigmas": True}, "Karras"), ({"use_exponential_sigmas": True}, "Exponential")],
)
def test_the_noise_schedule_is_named(scheduler, named):
    text = written(stand_in_manifest(scheduler=scheduler)).info["parameters"]
    assert parse_as_the_web_ui_does(text)[2].get("Schedule type") == named


def test_the_artifact_is_named_by_key_and_digest():
    manifest = stand_in_manifest()
    own = json.loads(written(manifest).info["sdxl-build"])
    artifact = own.pop("artifact")
    none = dict.fromkeys(("image", "strength", "refiner", "refine_at", "refine_strength"))
    assert own == {**BASE, **none, "lora": [], "embedding": []}
    assert artifact["key"] == manifest.key_digest and artifact["manifest"] == manifest.digest
    assert (artifact["backend"], artifact["target"], artifact["precision"]) == ("torch", "cpu-avx2", "fp32")


def test_equal_pictures_are_equal_files():
    one, two = (png.encode(Image.new("RGB", (8, 8)), Parameters(**BASE), stand_in_manifest()) for _ in range(2))
    assert one == two
