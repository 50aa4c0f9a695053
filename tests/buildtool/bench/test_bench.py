"""sdxl-bench: what it measures, what it refuses, and the page that it leaves."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from buildtool.bench import accuracy, cases, cli, likeness, peer, report
from buildtool.store import machine
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from tests.runtimes.stand_in import stand_in_manifest
from training.captions import read
from training.render import render, to_uint8

STAND_IN = '''
"""Stands in for sdxl-run: refuses an unknown field, else writes grey pictures on a timeline of its own."""
import json, sys
from pathlib import Path
from PIL import Image
words = sys.argv[1:]
lines = [json.loads(l) for l in Path(words[words.index("--prompts") + 1]).read_text().splitlines()]
if any("memory" in line for line in lines):
    sys.exit("Error: line 1: Object contains unknown field `memory`.")
if any("stepz" in line for line in lines):
    sys.exit("Error: line 1: Object contains unknown field `stepz`.")
if "--dry-run" in words:
    print(json.dumps({"images": lines}))
    sys.exit()
timeline, now = [{"name": "open artifact", "start": 0.2, "end": 0.8}], 1.0
for line in lines:
    Image.new("RGB", (32, 32), (line.get("steps", 50),) * 3).save(line["out"])
    took = 3.0 if now == 1.0 else 0.5
    timeline += [{"name": "denoise", "start": now, "end": now + took - 0.1}]
    timeline += [{"name": "save", "start": now + took - 0.1, "end": now + took}]
    now += took
images = [{"steps": line.get("steps", 50)} for line in lines]
print(json.dumps({"timeline": timeline, "images": images, "peak_memory_bytes": {"process": 5_000_000}}))
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stand_in.py"
    file.write_text(STAND_IN)
    monkeypatch.setattr(cases, "RUN", (sys.executable, str(file)))


def run(capsys: Any, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_options_are_fields_of_json_lines() -> None:
    found = cases.parse_options("steps=20 guidance-until=0.75 scheduler=dpmpp-2m 'negative-prompt=grey background'")
    assert found == {
        "steps": 20,
        "guidance_until": 0.75,
        "scheduler": "dpmpp-2m",
        "negative_prompt": "grey background",
    }
    with pytest.raises(SdxlError, match="no NAME=VALUE"):
        cases.parse_options("steps 20")


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_the_warm_up_counts_for_nothing(micro_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench"
    options = ("--with", "steps=20", "--with", "steps=30", "--runs", "3", "--out", str(out))
    code, printed, _ = run(capsys, "--engine", f"{micro_artifact}\n", *options)
    assert (code, printed.strip()) == (0, str(out / "report.html"))
    told = json.loads((out / "results.json").read_text())["cases"]
    assert [case["options"] for case in told] == [{"steps": 20}, {"steps": 30}]
    for case in told:
        assert len(case["seconds"]) == 3 * len(cli.PROMPTS)
        assert case["seconds"] == pytest.approx([0.5] * len(case["seconds"]))
        assert case["load_seconds"] == pytest.approx(0.8)
        assert case["first_call_extra_seconds"] == pytest.approx(4.0 - 0.8 - 0.5)
        assert case["first_picture_seconds"] == pytest.approx(4.0)
        assert case["steps_per_second"] == pytest.approx(case["options"]["steps"] / 0.4)
    assert told[0]["psnr"] is None and told[0]["ssim"] == pytest.approx(1)  # equal to itself
    assert told[1]["psnr"] == pytest.approx(10 * np.log10(255**2 / 10**2))


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_the_page_needs_nothing_from_elsewhere(micro_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a <b>bold</b> cat & a dog\n")
    out = tmp_path / "bench"
    words = ("--engine", str(micro_artifact), "--prompts", str(prompts), "--runs", "1", "--out", str(out))
    assert run(capsys, *words)[0] == 0
    page = (out / "report.html").read_text()
    assert "a &lt;b&gt;bold&lt;/b&gt; cat &amp; a dog" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(re.findall(r'<img [^>]*alt="[^"]+"', page)) == 2
    for name in ("times.png", "pictures.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 200
    lines = (out / "results.md").read_text().splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_a_memory_mode_is_an_option_of_the_process_and_its_pictures_have_no_calls_of_their_own(
    micro_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    started = cases._run
    monkeypatch.setattr(cases, "_run", lambda case, command: asked.append(list(command)) or started(case, command))
    (case,) = cases.open_cases([micro_artifact], [{"steps": 2, "memory": "staged"}])
    result = cases.measure(case, [("a", 1), ("b", 2)], 1, tmp_path)
    assert asked[0][asked[0].index("--memory") + 1] == "staged" and case.name.endswith("memory=staged")
    assert result.seconds == [pytest.approx((1.0 + 3.0 + 2 * 0.5 - 0.8) / 3)], "all pictures, from the open artifact on"
    assert result.spread is None and result.extra is None


@pytest.mark.usefixtures("stand_in")
def test_what_a_run_refuses_is_told_before_any_work(micro_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench"
    words = ("--engine", str(micro_artifact), "--with", "steps=2", "--with", "stepz=2", "--out", str(out))
    code, printed, said = run(capsys, *words)
    assert code == 1 and not printed and "unknown field `stepz`" in said
    assert len(said.strip().splitlines()) == 1
    assert not list(out.glob("*.png"))


@pytest.mark.usefixtures("stand_in")
def test_a_refiner_is_an_option_of_the_run_and_its_steps_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = tmp_path / "store" / "my-refiner" / "cpu-avx2" / "64x64"
    options = cases.parse_options(f"steps=10 refiner={second} refine-at=0.8")
    case = cases.Case(1, tmp_path, stand_in_manifest(), options)
    assert case.name.endswith("steps=10, refiner=my-refiner, refine-at=0.8")
    asked: list[list[str]] = []

    def answer(case: cases.Case, command: list[str]) -> dict[str, Any]:
        asked.append(list(command))
        # The base's loop and the refiner's, of a first call that takes longer and of two more.
        loops = [(0, 9), (9, 10), (11, 11.4), (11.4, 11.5), (12, 12.4), (12.4, 12.5)]
        spans = [("open artifact", (0, 0)), *(("denoise", loop) for loop in loops)]
        spans += [("save", (end, end)) for end in (10, 12.5, 11.5)]  # as threads end
        timeline = [{"name": name, "start": start, "end": end} for name, (start, end) in spans]
        images = [{"steps": 10}] * 3
        return {
            "timeline": timeline,
            "images": images,
            "unet_steps": {"full": 30, "shallow": 0},
            "peak_memory_bytes": {},
        }

    monkeypatch.setattr(cases, "_run", answer)
    result = cases.measure(case, [("a", 1)], 2, tmp_path)
    assert result.steps_per_second == pytest.approx(10 / 0.5)
    assert result.seconds == pytest.approx([1.5, 1.0])
    (words,) = asked
    assert words[words.index("--refiner") + 1] == str(second)
    lines = [json.loads(line) for line in (tmp_path / "case1.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["refine_at"] == 0.8 and "refiner" not in line for line in lines)


def test_more_pictures_than_a_timeline_keeps_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [("open artifact", (0, 0)), *((name, (i, i + 1)) for i in range(3) for name in ("denoise", "save"))]
    timeline = [{"name": name, "start": start, "end": end} for name, (start, end) in spans]
    told = {"timeline": timeline, "images": [{"steps": 10}] * 5, "peak_memory_bytes": {"process": 1}}
    monkeypatch.setattr(cases, "_run", lambda case, command: told)
    case = cases.Case(1, tmp_path, stand_in_manifest(), {})
    with pytest.raises(SdxlError, match=r"5 pictures were made, and a timeline ends at 3. Take fewer"):
        cases.measure(case, [("a", 1)], 4, tmp_path)


def test_cases_are_told_apart_by_what_was_built_and_without_this_machines_folders(tmp_path: Path) -> None:
    lora = [{"sha256": "0" * 64, "scale": 1.0}]
    built = {"vae_tile": [192, 128], "encoder": True, "no_negative_prompt": True, "segments": 3, "lora": lora}
    options = {"lora": ["/a/one.safetensors:0.5", "two.safetensors"], "image": "/a/b.png", "steps": 2}
    plain, made = stand_in_manifest(), stand_in_manifest(batch=4, options=built)
    assert cases.Case(1, tmp_path, plain, options).name == (
        "torch fp32 64x64, lora=one.safetensors:0.5+two.safetensors, image=b.png, steps=2"
    )
    asked = {"negative_prompt": "black/white", "embedding": "/a/new.safetensors:<new>"}
    assert cases.Case(1, tmp_path, plain, asked).name == (
        "torch fp32 64x64, negative-prompt=black/white, embedding=new.safetensors:<new>"
    )
    told = "torch fp32 64x64, batch 4, 1 LoRA built in, vae-tile 192x128, with-encoder, no-negative-prompt, segments 3"
    assert cases.Case(1, tmp_path, made, {}).name == told
    assert cases.Case(1, tmp_path, made, {}, "eager").name == "diffusers eager fp32 64x64, batch 4, 1 LoRA built in"


def test_a_folder_that_is_no_artifact(tmp_path: Path, capsys: Any) -> None:
    code, printed, said = run(capsys, "--engine", str(tmp_path), "--out", str(tmp_path / "bench"))
    assert code == 1 and not printed and said.startswith("Error: ") and not (tmp_path / "bench").exists()


SAID = "a large red circle in the centre on a white background"
OTHER = "a large blue square in the centre on a white background"


def judged(folder: Path, model: str = "tiny") -> list[cases.Result]:
    """Two cases of three prompts; the first draws what SAID says, the second what OTHER says."""
    results = []
    for number, said in enumerate((SAID, OTHER), 1):
        path = folder / f"case{number}.png"
        Image.fromarray(to_uint8(render([read(said)], 256, 256))[0].numpy()).save(path)
        case = cases.Case(number, folder, stand_in_manifest(model=model), {})
        results.append(cases.Result(case, None, seconds=[1.0], peak_memory_bytes={"process": 1}, pictures=[path] * 3))
    return results


def test_pictures_of_tiny_are_judged_by_their_prompts(tmp_path: Path) -> None:
    prompts = [(SAID, 1), (OTHER, 2), ("a lighthouse at dusk", 3)]
    results = judged(tmp_path)
    assert accuracy.judge(results, prompts) == ""
    assert [result.right for result in results] == [[True, False, None], [False, True, None]]
    results[0].right[2] = True
    page = report.write(results, prompts, {}, tmp_path).read_text()
    for text in (page, (tmp_path / "results.md").read_text()):
        assert "right" in text and "66.7% of 3" in text and "50.0% of 2" in text
    first, second = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert (first["right"], second["right"]) == (pytest.approx(2 / 3), 0.5)
    assert second["right_pictures"] == [False, True, None]


def test_what_cannot_be_judged_has_no_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [("a lighthouse at dusk", seed) for seed in range(3)]
    for results in (judged(tmp_path), judged(tmp_path, "micro")):
        assert accuracy.judge(results, prompts) == ""
        assert report.RIGHT not in report.columns(results) and len(report.rows(results)[0]) == len(report.COLUMNS)
    results = judged(tmp_path)
    (tmp_path / "case2.png").unlink()
    assert "FileNotFoundError" in accuracy.judge(results, [(SAID, 1)] * 3) and not results[0].right
    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    assert accuracy.judge(judged(tmp_path, "micro"), prompts) == ""


@pytest.mark.usefixtures("stand_in")
def test_prompts_of_the_world_of_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(manifests, "read", lambda folder: stand_in_manifest())
    words = ("--engine", str(tmp_path), "--prompts", "tiny:2", "--runs", "1", "--out")
    assert run(capsys, *words, str(tmp_path / "bench"))[0] == 0
    told = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert len(told["prompts"]) == 2 and all(read(one["prompt"]).things for one in told["prompts"])
    assert told["cases"][0]["right_pictures"] == [False, False], "they are grey"


@pytest.mark.usefixtures("stand_in")
def test_outside_a_clone_a_line_says_why_nothing_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(manifests, "read", lambda folder: stand_in_manifest())
    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    words = ("--engine", str(tmp_path), "--runs", "1", "--out", str(tmp_path / "bench"))
    code, _, said = run(capsys, *words)
    assert code == 0 and "isn't judged" in said.splitlines()[-1]
    assert "isn&#x27;t judged" in (tmp_path / "bench" / "report.html").read_text()
    assert "right |" not in (tmp_path / "bench" / "results.md").read_text()
    code, printed, said = run(capsys, *words, "--prompts", "tiny:2")
    assert code == 1 and not printed and "needs the project's source" in said and len(said.splitlines()) == 1


def picture(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def test_likeness_of_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 246, (40, 48, 3))
    one, lighter = picture(tmp_path / "1.png", first), picture(tmp_path / "2.png", first + 10)
    other = picture(tmp_path / "3.png", rng.integers(0, 256, (40, 48, 3)))
    assert likeness.psnr(one, one) == float("inf") and likeness.ssim(one, one) == pytest.approx(1)
    assert likeness.psnr(one, lighter) == pytest.approx(28.13, abs=0.01)
    assert likeness.ssim(one, lighter) > 0.95 > 0.1 > likeness.ssim(one, other)


def test_pictures_are_equal_only_if_all_are(tmp_path: Path) -> None:
    one, two = (picture(tmp_path / f"{i}.png", np.full((16, 16, 3), 100 + 10 * i)) for i in range(2))

    def of(*pictures: Path) -> Any:
        return SimpleNamespace(pictures=list(pictures))

    assert report.likeness(of(one, one), of(one, one))[0] == float("inf")
    assert report.likeness(of(one, two), of(one, one))[0] == pytest.approx(28.13, abs=0.01)


def test_ssim_of_flat_pictures_is_the_papers_luminance_term(tmp_path: Path) -> None:
    one = picture(tmp_path / "1.png", np.full((20, 20, 3), 100))
    two = picture(tmp_path / "2.png", np.full((20, 20, 3), 150))
    c1 = (0.01 * 255) ** 2
    assert likeness.ssim(one, two) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-9)


@pytest.mark.slow
def test_a_real_artifact(tiny_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red circle on the left\n")
    options = ("--with", "steps=3", "--with", "steps=3 guidance=1", "--prompts", str(prompts), "--runs", "1")
    code, _, said = run(capsys, "--engine", str(tiny_artifact), *options, "--out", str(tmp_path / "bench"))
    assert code == 0, said
    guided, unguided = json.loads((tmp_path / "bench" / "results.json").read_text())["cases"]
    assert guided["first_picture_seconds"] > guided["seconds"][0] > 0
    assert guided["peak_memory_bytes"]["process"] > 1e8
    assert 5 < unguided["psnr"] < 60
    assert report.COLUMNS[0] in (tmp_path / "bench" / "results.md").read_text()


@pytest.mark.slow
def test_diffusers_draws_the_same_picture(tiny_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    options = ("--with", "steps=3 guidance-until=0.5 negative-prompt=green", "--prompts", str(prompts), "--runs", "1")
    words = ("--engine", str(tiny_artifact), *options, "--peer", "eager", "--out", str(tmp_path / "bench"))
    code, _, said = run(capsys, *words)
    assert code == 0, said
    ours, theirs = json.loads((tmp_path / "bench" / "results.json").read_text())["cases"]
    assert (ours["peer"], theirs["peer"]) == (None, "eager")
    assert theirs["case"].startswith("diffusers eager fp32 256x256") and theirs["build_seconds"] is None
    assert theirs["psnr"] is None or theirs["psnr"] > 50
    assert theirs["first_picture_seconds"] >= theirs["load_seconds"] > 0 < theirs["steps_per_second"]
    assert theirs["peak_memory_bytes"]["process"] > 1e8


@pytest.mark.slow
def test_a_peer_is_refused_by_name(micro_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifests.read(micro_artifact)
    with pytest.raises(SdxlError, match=r"--peer stable-fast: .* is not installed.*\n?.*pip install stable-fast"):
        peer.check("stable-fast", manifest, {})
    monkeypatch.setattr(machine, "versions", lambda *names: dict.fromkeys(names, "1.0"))
    with pytest.raises(SdxlError, match="for NVIDIA GPUs"):
        peer.check("stable-fast", manifest, {})
    with pytest.raises(SdxlError, match="no option scheduler"):
        peer.check("eager", manifest, {"scheduler": "ddim"})
    with pytest.raises(SdxlError, match=r"guidance-until=0\.5"):
        peer.check("deepcache", manifest, {"guidance_until": 0.5})


@pytest.mark.parametrize(("target", "wanted"), [("sm90", "cuda:0"), ("cpu-avx2", "cpu")])
def test_a_peer_is_given_its_gpu_by_number(
    target: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.set_device, which libraries call with it, refuses one without."""
    plain = stand_in_manifest()
    manifest = msgspec.structs.replace(plain, key=msgspec.structs.replace(plain.key, target=target))
    given: list[Any] = []

    def stop(name: str, manifest: Any, device: Any) -> Any:
        given.extend((name, str(device)))
        raise StopIteration

    monkeypatch.setattr(manifests, "read", lambda folder: manifest)
    monkeypatch.setattr(peer, "pipeline", stop)
    (tmp_path / "prompts").write_text("{}\n")
    with pytest.raises(StopIteration):
        peer.main("eager", "engine", str(tmp_path / "prompts"), "0")
    assert given == ["eager", wanted]


@pytest.mark.slow
def test_a_model_that_is_gone_or_changed(tiny_artifact: Path, tmp_path: Path) -> None:
    manifest = manifests.read(tiny_artifact)
    assert peer.source(manifest).weights == manifest.key.weights
    words = tuple(str(tmp_path / "gone") if word == "tiny" else word for word in manifest.command)
    with pytest.raises(SdxlError, match=r"was built from can't be read: .*gone does not exist"):
        peer.source(msgspec.structs.replace(manifest, command=words))
    key = msgspec.structs.replace(manifest.key, weights={**manifest.key.weights, "unet": "0" * 64})
    with pytest.raises(SdxlError, match="tiny is not what the artifact was built from"):
        peer.source(msgspec.structs.replace(manifest, key=key))
