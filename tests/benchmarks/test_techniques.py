"""``benchmarks/techniques.py``: options that exist, rows as they come, and what fails among them. Nothing is built."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import buildtool
from benchmarks import techniques
from benchmarks.techniques import TECHNIQUES, Measurements, Plan, Technique
from buildtool import tokenizers
from buildtool.bench import accuracy, cases
from buildtool.cli import main as sdxl_build
from buildtool.store import lora
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Component, StoredTensor
from buildtool.store.presets import PRESETS
from runtimes import embedding_files, lora_names
from runtimes.jobs import Job
from runtimes.prompt import Tokenizer
from tests.runtimes.stand_in import stand_in_manifest


def plan(model: str = "tiny", gpu: str = "cpu") -> Plan:
    return Plan(model, gpu, Path("store"), 50)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A `sdxl-build` that can't do DeepCache, and a `sdxl-bench` without schedulers and peers. What was built."""
    words_of: list[str] = []

    def build(words: tuple[str, ...], store: Path) -> Path:
        words_of.append(" ".join(words))
        if "--deepcache" in words:
            raise SdxlError("sdxl-build: no\n compiler")
        return tmp_path / "store" / words[2] / "cpu" / str(len(words_of))

    def check(case: cases.Case, *_: Any) -> None:
        if "scheduler" in case.options:
            raise SdxlError("there is no scheduler")

    def measure(case: cases.Case, prompts: Any, runs: int, out: Path) -> cases.Result:
        if case.peer:
            raise KeyError("denoise")  # a bug
        pictures = [out / f"case{case.number}-prompt{i}.png" for i in range(len(prompts))]
        for path in pictures:
            Image.new("RGB", (32, 32), (case.options["steps"],) * 3).save(path)
        peak = {"process": 5_000_000}
        return cases.Result(case, None, 1.0, 2.0, 3.0, [0.5] * runs, 10.0, peak, pictures)

    def judge(results: list[cases.Result], prompts: Any) -> str:
        results[0].right = [results[0].case.options["steps"] > 30 for _ in prompts]
        return ""

    monkeypatch.setattr(techniques, "_build", build)
    monkeypatch.setattr(cases, "check", check)
    monkeypatch.setattr(cases, "measure", measure)
    monkeypatch.setattr(accuracy, "judge", judge)
    monkeypatch.setattr(techniques.manifests, "read", lambda folder: stand_in_manifest())
    monkeypatch.setattr(techniques, "random_lora", lambda manifest, path: path)
    monkeypatch.setattr(techniques, "random_embedding", lambda manifest, path: path)
    return words_of


@pytest.mark.parametrize(("model", "gpu"), [("tiny", "cpu"), ("random:sdxl-base", "auto"), ("./my-model", "sm90")])
def test_every_technique_is_of_options_that_exist(model: str, gpu: str) -> None:
    known = {*Job.__struct_fields__, *cases.FLAGS}
    for technique in TECHNIQUES:
        backend, *words = plan(model, gpu).words(technique.build, backend=technique.backend)
        sdxl_build.commands[backend].make_context(backend, [*words])  # type: ignore[attr-defined]
        assert cases.parse_options(technique.run).keys() <= known, technique.name
    assert {technique.name for technique in TECHNIQUES} > PRESETS.keys()


def test_what_is_left_out_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(*where: str) -> set[str]:
        here = plan(*where)
        kept, out = techniques.select(here, [], [])
        assert all(map(here.lacks, out)) and not any(map(here.lacks, kept)) and len(kept) + len(out) == len(TECHNIQUES)
        return {technique.name for technique in out}

    monkeypatch.delenv("SDXL_ONEDIFF_PYTHON", raising=False)
    assert left("random:sdxl-base", "auto") == {"onediff"}
    assert left("tiny", "auto") == {"onediff", "vae-default", "vram6", "vram4"}
    assert {"fp8", "sequential", "onediff"} < left()
    monkeypatch.setenv("SDXL_ONEDIFF_PYTHON", "python3")
    assert left("random:sdxl-base", "auto") == set()


def test_a_preset_brings_its_own_vae_and_all_else_the_baselines() -> None:
    full = plan("random:sdxl-base", "auto")
    assert full.words() == ("torch", "--model", "random:sdxl-base", "--gpu", "auto", "--vae", "fp16-fix")
    assert full.words("--vae tiny").count("--vae") == 1 and "--vae" not in full.words("--preset vram4")
    assert full.words("--vae-tile TILE")[-4:] == ("--vae", "fp16-fix", "--vae-tile", "512x512")
    assert full.words(refiner=True)[2] == "random:sdxl-refiner" and plan().words(refiner=True)[2] == "tiny-refiner"
    assert "--vae" not in plan().words()


def test_rows_come_one_by_one_and_failures_among_them(
    built: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "told.json"
    words = ["--model", "tiny", "--gpu", "cpu", "--runs", "2", "--prompts", "1", "--json", str(told)]
    assert techniques.main([*words, "--skip", "compile", "--artifacts", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    rows = {row["technique"]: row for row in json.loads(told.read_text())["rows"]}
    assert [name for name, row in rows.items() if "failure" in row] == ["scheduler", "deepcache", "eager"]
    assert rows["deepcache"]["failure"] == "sdxl-build: no compiler", "in one line"
    assert rows["eager"]["failure"] == "KeyError: 'denoise'"
    assert rows["fewer-steps"]["psnr"] == pytest.approx(20 * math.log10(255 / 20))
    assert (rows["fewer-steps"]["right"], rows["staged"]["right"], rows["image-to-image"]["right"]) == (0, 1, None)
    assert rows["refiner"]["run"] == "steps=50 refiner=tiny-refiner refine-at=0.8"
    assert rows["image-to-image"]["ssim"] is None and rows["vae-tiny"]["ssim"] == pytest.approx(1)
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    assert "100.0% of 1 |" in table[2] and "`--vae-tile 192x192`" in out and str(tmp_path) not in "".join(table)
    assert "vram4, it needs a GPU" in out and "| compile" not in out
    assert len(built) == len(set(built)), "each artifact once"


def test_two_names_of_one_thing_are_measured_once(built: list[str], tmp_path: Path) -> None:
    measurements = Measurements(plan(), [("a", 1)], 1, tmp_path)
    for name in ("baseline", "staged", "vram8"):
        (technique,) = (each for each in TECHNIQUES if each.name == name)
        measurements.row(Technique(name, run=technique.run))
    assert len(measurements.results) == 2


def test_without_a_baseline_nothing_is_compared(built: list[str], tmp_path: Path) -> None:
    measurements = Measurements(plan(), [("a", 1)], 1, tmp_path)
    assert measurements.row(Technique(techniques.BASELINE, peer="eager")).failure
    row = measurements.row(Technique("fewer-steps", run="steps=FEWER"))
    assert row.result and math.isnan(row.psnr)
    assert "no picture" in measurements.row(Technique("image-to-image", run="image=PICTURE")).failure


def test_what_cannot_be_measured_here_fails_if_it_is_asked_for(built: list[str], tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    words = ["--model", "tiny", "--gpu", "cpu", "--only", "fp8", "--json", str(told), "--out", str(tmp_path / "out")]
    assert techniques.main(words) == 1
    baseline, fp8 = json.loads(told.read_text())["rows"]
    assert baseline["seconds"] and fp8["failure"] == "it needs a GPU"
    assert (tmp_path / "out" / "report.html").exists()


def test_building_alone_measures_nothing(built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--gpu", "cpu", "--build-only", "--jobs", "3"]
    assert techniques.main([*words, "--only", "deepcache", "--only", "refiner"]) == 1
    tiny = "torch --model tiny --gpu cpu"
    assert sorted(built) == [tiny, f"{tiny} --deepcache 3", "torch --model tiny-refiner --gpu cpu"]
    assert techniques.main([*words, "--only", "freeu"]) == 0
    assert capsys.readouterr().out == ""


def test_the_random_embedding_is_one_that_the_first_prompt_uses(tmp_path: Path) -> None:
    tokenizers.convert(Path(buildtool.__file__).parent / "data" / "tiny" / "tokenizer", tmp_path / "tokenizer.json")
    clip = Tokenizer(tmp_path / "tokenizer.json")
    configs = {"text_encoder": {"hidden_size": 8}, "text_encoder_2": {"hidden_size": 12}}
    manifest = SimpleNamespace(
        key=SimpleNamespace(configs=configs, options={"spare_tokens": techniques.VECTORS}, model="m"),
        components=dict.fromkeys(configs),
    )
    path = techniques.random_embedding(manifest, tmp_path / "a.safetensors")  # type: ignore[arg-type]
    for each in (plan(), plan("random:sdxl-base", "auto")):
        ((prompt, _),) = techniques.own_prompts(each, 1)
        embedding = embedding_files.parse(f"{path}:{techniques.new_word(prompt)}")
        assert embedding.token in prompt and not clip.knows(embedding.token)
        embedding_files.check([embedding], manifest)  # type: ignore[arg-type]


def test_the_random_lora_is_one_for_the_unets_attention(tmp_path: Path) -> None:
    names = {"down.attentions.0.to_q.weight": (8, 4), "down.attentions.0.to_k.weight": (6, 4), "conv_in.weight": (3, 9)}
    tensors = {
        "qk": StoredTensor(shape=(14, 4), dtype="float32", stride=(4, 1), sources=tuple(names)[:2]),
        "conv": StoredTensor(shape=(3, 9), dtype="float32", stride=(9, 1), sources=("conv_in.weight",)),
    }
    unet = Component(loader="", precision="fp32", code_key="", weights="", tensors=tensors, variants={})
    rows = lora_names.stored_rows(unet)
    path = techniques.random_lora(SimpleNamespace(components={"unet": unet}), tmp_path / "a.safetensors")  # type: ignore[arg-type]
    found = lora.products(path, {"unet": {name: size for name, (_, _, size) in rows.items()}})
    assert set(found["unet"]) == {name for name in names if "attentions" in name}
