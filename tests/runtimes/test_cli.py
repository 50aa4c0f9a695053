"""``sdxl-run`` against a stand-in pipeline: options, files, answers, and how it fails."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from PIL import Image

import runtimes
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.presets import PRESETS
from runtimes import cli, cuda_graph
from tests.runtimes.stand_in import StandInPipeline, stand_in_artifact

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    for name in ("SDXL_ENGINE", "SDXL_OUT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def engine(tmp_path):
    return stand_in_artifact(tmp_path / "engine")


@pytest.fixture
def loaded(monkeypatch):
    """The pipelines that were loaded."""
    made = []

    def load(paths, **_):
        made.append(StandInPipeline(paths))
        return made[-1]

    monkeypatch.setattr(runtimes, "load", load)
    return made


@pytest.fixture
def run(engine, loaded, capsysbinary):
    """Runs the command line; answers (exit code, stdout, stderr)."""

    def call(*args, engines=(engine,)):
        words = [word for folder in engines for word in ("--engine", str(folder))]
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, *map(str, args)])
        out, err = capsysbinary.readouterr()
        return caught.value.code or 0, out.decode(), err.decode()

    return call


def one_line(err):
    assert err.startswith("Error: ") and err.count("\n") == 1, err
    return err


# -- pictures --------------------------------------------------------------------------------------


def test_paths_go_to_stdout_and_times_to_stderr(run, loaded, here):
    code, out, err = run("--prompt", "a fox", "--prompt", "a cat", "--seed", 7, "--steps", 3)
    assert code == 0
    assert out == "sdxl-7.png\nsdxl-8.png\n"
    assert [Image.open(name).size for name in out.split()] == [(64, 64)] * 2
    assert re.fullmatch(
        r"load [\d.]+ s, encode 0\.20 s, denoise 1\.00 s \(6\.00 steps/s\), decode 0\.40 s, save [\d.]+ s, "
        r"total [\d.]+ s, peak memory [\d.]+ [MG]B\n",
        err,
    )
    assert sorted(path.name for path in here.iterdir()) == ["sdxl-7.png", "sdxl-8.png"]


def test_defaults_are_those_of_diffusers(run, loaded):
    run("--prompt", "a fox", "--seed", 1)
    (call,) = loaded[0].calls
    assert call == {
        "prompt": ["a fox"],
        "negative_prompt": None,
        "width": 64,
        "height": 64,
        "steps": 50,
        "guidance_scale": 5.0,
        "guidance_until": 1.0,
        "scheduler": "euler",
        "seeds": [1],
    }


def test_picture_i_has_seed_plus_i_and_says_so(run, loaded):
    _, out, _ = run("--prompt", "a fox", "--prompt", "b", "--num-images", 2, "--seed", 40, "--negative-prompt", "n")
    assert [call["seeds"] for call in loaded[0].calls] == [[40], [41], [42], [43]]
    for i, name in enumerate(out.split()):
        text = Image.open(name).info["parameters"]
        assert f"Seed: {40 + i}," in text and "Negative prompt: n\n" in text
        assert text.startswith("a fox\n" if i < 2 else "b\n")


def test_a_batch_is_filled_and_gives_the_same_pictures(run, loaded, tmp_path):
    batched = stand_in_artifact(tmp_path / "b2", batch=2)
    options = ("--prompt", "a", "--prompt", "b", "--prompt", "c", "--seed", 3)
    _, one, _ = run(*options, "--out", "one-{seed}.png")
    _, two, _ = run(*options, "--out", "two-{seed}.png", "--negative-prompt", "n", engines=[batched])
    assert [(call["prompt"], call["negative_prompt"]) for call in loaded[1].calls] == [
        (["a", "b"], ["n", "n"]),
        (["c"], ["n"]),
    ]
    for a, b in zip(one.split(), two.split(), strict=True):
        assert Image.open(a).tobytes() == Image.open(b).tobytes()


def test_without_a_seed_one_is_drawn_and_said(run, loaded):
    first, second = (run("--prompt", "a", "--num-images", 2) for _ in range(2))
    seeds = [int(re.match(r"Seed: (\d+)\n", err)[1]) for _, _, err in (first, second)]
    assert seeds[0] != seeds[1]
    assert loaded[0].calls[1]["seeds"] == [seeds[0] + 1]
    assert f"sdxl-{seeds[0]}.png" in first[1]


def test_settings_reach_the_pipeline(run, loaded):
    run("--prompt", "", "--guidance", 1, "--guidance-until", 0.75, "--steps", 9, "--negative-prompt", "")
    (call,) = loaded[0].calls
    assert call["prompt"] == [""] and call["negative_prompt"] == [""]
    assert (call["guidance_scale"], call["guidance_until"], call["steps"]) == (1, 0.75, 9)


def test_a_scheduler_reaches_the_pipeline_and_the_picture(run, loaded):
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "scheduler": "dpmpp-2m-karras"}\n')
    _, out, _ = run("--prompts", "p.jsonl", "--seed", 1, "--scheduler", "euler-a")
    assert [call["scheduler"] for call in loaded[0].calls] == ["euler-a", "dpmpp-2m-karras"]
    first, second = (Image.open(name).info for name in out.split())
    assert "Sampler: Euler a," in first["parameters"]
    assert "Sampler: DPM++ 2M, Schedule type: Karras," in second["parameters"]
    assert json.loads(second["sdxl-build"])["scheduler"] == "dpmpp-2m-karras"


def test_the_models_own_scheduler_is_the_default_and_an_unknown_one_is_refused(run, loaded, tmp_path):
    own = stand_in_artifact(tmp_path / "ddim", scheduler={"_class_name": "DDIMScheduler"})
    other = stand_in_artifact(tmp_path / "unipc", scheduler={"_class_name": "UniPCMultistepScheduler"})
    assert run("--prompt", "a", engines=[own])[0] == 0
    assert loaded[0].calls[0]["scheduler"] == "ddim"
    code, _, err = run("--prompt", "a", engines=[other])
    assert code == 1 and len(loaded) == 1
    assert "UniPCMultistepScheduler" in one_line(err) and "dpmpp-2m-karras" in err
    assert run("--prompt", "a", "--scheduler", "euler", engines=[other])[0] == 0


def test_a_picture_to_start_from_reaches_the_pipeline(run, loaded, tmp_path):
    reads = stand_in_artifact(tmp_path / "reads", encoder=True)
    Image.new("RGB", (10, 10), "red").save("start.png")
    code, out, _ = run("--prompt", "a", "--seed", 1, "--image", "start.png", "--strength", 0.5, engines=[reads])
    (call,) = loaded[0].calls
    assert code == 0 and call["image"].size == (10, 10) and call["strength"] == 0.5
    info = Image.open(out.strip()).info
    assert "Denoising strength: 0.5," in info["parameters"]
    own = json.loads(info["sdxl-build"])
    assert (own["image"], own["strength"]) == ("start.png", 0.5)


@pytest.mark.parametrize(
    ("name", "encoder", "words"),
    [
        ("none.png", True, "none.png does not exist"),
        ("text.png", True, "text.png cannot be read"),
        ("start.png", False, "no VAE encoder"),
    ],
)
def test_what_cannot_be_started_from_is_one_line(run, loaded, tmp_path, name, encoder, words):
    engine = stand_in_artifact(tmp_path / "other", encoder=encoder)
    Image.new("RGB", (10, 10)).save("start.png")
    Path("text.png").write_text("no picture")
    code, out, err = run("--prompt", "a", "-q", "--image", name, engines=[engine])
    assert (code, out) == (1, "") and words in one_line(err)
    assert encoder or "--with-encoder" in err


def test_a_refiner_goes_on_from_the_pictures(run, loaded, tmp_path):
    second = stand_in_artifact(tmp_path / "second", model="second", refiner=True)
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "refine_strength": 0.5}\n')
    _, out, _ = run("--prompts", "p.jsonl", "--seed", 1, "--refiner", second, "--refine-at", 0.8, "--steps", 5)
    base, beside = loaded
    assert [call.get("denoising_end") for call in base.calls] == [0.8, None]
    assert [call["output_type"] for call in base.calls] == ["latent"] * 2
    assert [(call.get("denoising_start"), call.get("strength")) for call in beside.calls] == [(0.8, None), (None, 0.5)]
    for call in beside.calls:
        assert call["image"] and call["scheduler"] is None and call["steps"] == 5 and "output_type" not in call
    first, other = (Image.open(name).info for name in out.split())
    assert "Refiner: second, Refiner switch at: 0.8," in first["parameters"]
    assert "Refiner: second, Refiner strength: 0.5," in other["parameters"]
    assert json.loads(first["sdxl-build"])["refiner_artifact"]["model"] == "second"
    run("--prompt", "a", "--refiner", second, "--scheduler", "euler-a")
    assert loaded[3].calls[0]["strength"] == 0.3 and loaded[3].calls[0]["scheduler"] == "euler-a"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--refine-at", 0.8], "--refine-at says what a refiner does"),
        (["--refine-strength", 0.8], "--refine-strength says what a refiner does"),
        (["--refiner", ""], "--refiner is empty"),
        (["--refiner", "nowhere"], "nowhere does not exist"),
        (["--refiner", "wide"], "No --refiner makes 64x64; those given make 96x64"),
        (["--refiner", "cached", "--guidance-until", 0.5], "can't be had with DeepCache"),
        (["--refiner", "unipc"], "UniPCMultistepScheduler"),
        (["--refiner", "same", "--expect-digest", "0" * 64], "expected was"),
    ],
)
def test_what_a_refiner_cannot_do_is_one_line_before_anything_is_loaded(run, loaded, words, said):
    for name, settings in {
        "wide": {"width": 96},
        "cached": {"options": {"deepcache": {"interval": 3, "branch": 0}}},
        "unipc": {"scheduler": {"_class_name": "UniPCMultistepScheduler"}},
        "same": {},
    }.items():
        stand_in_artifact(Path(name), refiner=True, **settings)
    code, out, err = run("--prompt", "a", "-q", *words)
    assert (code, out, loaded) == (1, "", []) and said in one_line(err)


def test_a_refiners_digest_is_expected_too(run, loaded, engine):
    second = stand_in_artifact(Path("second"), model="second", refiner=True)
    digests = [manifests.read(folder).digest for folder in (engine, second)]
    words = ["--prompt", "a", "--refiner", second, "--expect-digest", digests[0]]
    assert run(*words)[0] == 1 and not loaded
    assert run(*words, "--expect-digest", digests[1])[0] == 0


def test_a_refiner_is_no_engine_without_a_picture(run, loaded):
    second = stand_in_artifact(Path("second"), model="second", refiner=True, encoder=True)
    code, _, err = run("--prompt", "a", "-q", engines=[second])
    assert (code, loaded) == (1, []) and "second is a refiner" in one_line(err) and "--refiner DIR" in err
    Image.new("RGB", (10, 10)).save("start.png")
    assert run("--prompt", "a", "--image", "start.png", engines=[second])[0] == 0
    code, _, err = run("--prompt", "a", "-q", "--refiner", second, "--refine-at", 0.8, "--refine-strength", 0.5)
    assert code == 2 and "give one of them" in err
    reads = stand_in_artifact(Path("reads"), encoder=True)
    words = ["--image", "start.png", "--strength", 0.1, "--refiner", second, "--refine-at", 0.8]
    code, _, err = run("--prompt", "a", "-q", *words, engines=[reads])
    assert code == 1 and "--strength 0.1" in one_line(err)


def test_guidance_that_ends_early_is_refused_with_deepcache_before_anything_is_loaded(run, loaded, tmp_path):
    engine = stand_in_artifact(tmp_path / "other", options={"deepcache": {"interval": 3, "branch": 0}})
    code, out, err = run("--prompt", "a", "-q", "--guidance-until", 0.5, engines=[engine])
    assert (code, out, loaded) == (1, "", []) and "--guidance-until 0.5 can't be had with DeepCache" in one_line(err)
    assert run("--prompt", "a", "-q", "--guidance-until", 0.5, "--guidance", 1, engines=[engine])[0] == 0


def test_out_patterns_and_names_that_come_twice(run):
    _, out, _ = run("--prompt", "A Fox", "--num-images", 2, "--seed", 1, "--out", "new/{prompt}-{index:02d}.png")
    assert out == "new/a-fox-00.png\nnew/a-fox-01.png\n"
    _, out, _ = run("--prompt", "A Fox", "--num-images", 2, "--out", "fox.png")
    assert out == "fox.png\nfox-2.png\n"
    assert Path("fox.png").read_bytes() != Path("fox-2.png").read_bytes()


def test_json_is_one_object(run, engine):
    code, out, _ = run("--prompt", "a fox", "--num-images", 2, "--seed", 5, "--steps", 4, "--json")
    answer = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert answer["images"][1] == {
        "path": "sdxl-6.png",
        "index": 1,
        "prompt": "a fox",
        "negative_prompt": None,
        "seed": 6,
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance": 5.0,
        "guidance_until": 1.0,
        "scheduler": "euler",
        "image": None,
        "strength": None,
        "lora": [],
        "embedding": [],
        "refiner": None,
        "refine_at": None,
        "refine_strength": None,
    }
    assert list(answer["seconds"]) == ["load", "encode", "denoise", "decode", "save", "total"]
    assert answer["unet_steps"] == {"full": 8, "shallow": 0}
    assert answer["steps_per_second"] == 8.0 and answer["peak_memory_bytes"]["process"] > 10_000_000


def test_a_dry_run_checks_and_names_what_would_be_written(run, loaded, here):
    code, out, err = run("--prompt", "a fox", "--seed", 7, "--num-images", 2, "--dry-run")
    assert (code, out, err) == (0, "sdxl-7.png\nsdxl-8.png\n", "")
    code, out, _ = run("--prompt", "a fox", "--seed", 7, "--steps", 3, "--dry-run", "--json")
    assert [(image["path"], image["steps"]) for image in json.loads(out)["images"]] == [("sdxl-7.png", 3)]
    assert not loaded and not list(here.iterdir())
    code, out, err = run("--prompts", "-", "--dry-run")
    assert code == 2 and "--dry-run" in err


def test_quiet_says_nothing(run):
    assert run("--prompt", "a", "--quiet", "--out", "a.png") == (0, "a.png\n", "")


def test_a_warning_of_the_runtime_comes_once(run, loaded, monkeypatch):
    import logging

    def warn(self, *args, **settings):
        logging.getLogger("runtimes.encode").warning("cut: %s", "words")
        logging.getLogger("runtimes.encode").info("details")
        return call(self, *args, **settings)

    call = StandInPipeline.__call__
    monkeypatch.setattr(StandInPipeline, "__call__", warn)
    _, _, err = run("--prompt", "a", "--num-images", 3, "--seed", 1)
    assert err.count("Warning: cut: words\n") == 1 and "details" not in err
    _, _, err = run("--prompt", "a", "--seed", 1, "-v")
    assert "details\n" in err


def test_progress_is_drawn_on_a_terminal_only(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    _, out, _ = run("--prompt", "a", "--seed", 1, "--steps", 4)
    assert "Picture 1" in sys.stderr.getvalue() and "4/4" in sys.stderr.getvalue()
    assert out == "sdxl-1.png\n"


# -- prompts from files ----------------------------------------------------------------------------


def test_a_text_file_is_one_prompt_a_line(run, loaded, here):
    Path("p.txt").write_text("a fox\n\na cat\n")
    _, out, _ = run("--prompts", "p.txt", "--seed", 1, "--steps", 2)
    assert out == "sdxl-1.png\nsdxl-2.png\n"
    assert [call["prompt"] for call in loaded[0].calls] == [["a fox"], ["a cat"]]


def test_a_preset_sets_what_nobody_gave(run, loaded):
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "guidance_until": 0.5}\n')
    code, _, err = run("--prompts", "p.jsonl", "--seed", 1, "--preset", "fastest", "--steps", 7, "-v")
    assert code == 0
    assert [(call["steps"], call["guidance_until"]) for call in loaded[0].calls] == [(7, 0.75), (7, 0.5)]
    assert "--preset fastest: --steps 30 --guidance-until 0.75, but for what is given beside it" in err
    run("--prompt", "a", "--preset", "fastest")
    assert (loaded[1].calls[0]["steps"], loaded[1].calls[0]["guidance_until"]) == (30, 0.75)
    run("--prompt", "a")
    assert loaded[2].calls[0]["steps"] == 50
    assert run("--prompt", "a", "--preset", "slowest")[0] == 2


def test_presets_name_options_that_are_there():
    """All of them, of both programs, with values that those take."""
    from buildtool.cli import torch_command

    for preset in PRESETS.values():
        for command, options in ((cli.command, preset.run), (torch_command, preset.build)):
            named = {parameter.name: parameter for parameter in command.params}
            for name, value in options.items():
                context = click.Context(command)
                assert named[name].process_value(context, str(value)) == value


def test_json_lines_override_the_options(run, loaded, tmp_path, engine):
    wide = stand_in_artifact(tmp_path / "wide", width=96)
    lines = [
        {"prompt": "a", "seed": 100, "num_images": 2, "steps": 2, "guidance": 1.5, "guidance_until": 0.5},
        {"prompt": "b", "negative_prompt": None, "width": 96, "height": 64, "out": "wide.png"},
        {"prompt": "c"},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--prompts", "p.jsonl", "--seed", 7, "--steps", 3, "--negative-prompt", "n")
    _, out, _ = run(*options, engines=[engine, wide])
    assert out == "sdxl-100.png\nsdxl-101.png\nwide.png\nsdxl-10.png\n"
    first, _, second, third = loaded[0].calls
    assert (first["steps"], first["guidance_scale"], first["guidance_until"]) == (2, 1.5, 0.5)
    assert first["negative_prompt"] == ["n"]
    assert (second["negative_prompt"], second["width"], second["steps"], second["seeds"]) == (None, 96, 3, [9])
    assert (third["negative_prompt"], third["width"]) == (["n"], 64)
    assert Image.open("wide.png").size == (96, 64)


@pytest.mark.parametrize(
    ("text", "named"), [("", "holds no prompt"), ('{"prompt": "a"}\n{"prompt": 1}\n', "line 2"), (None, "not exist")]
)
def test_a_wrong_prompts_file_is_one_line_before_anything_is_loaded(run, loaded, text, named):
    if text is not None:
        Path("p.txt").write_text(text)
    code, out, err = run("--prompts", "p.txt", "--quiet")
    assert (code, out) == (1, "") and named in one_line(err) and not loaded


def stdin(monkeypatch, *lines):
    data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_lines_of_stdin_are_answered_one_by_one(run, loaded, monkeypatch):
    stdin(
        monkeypatch,
        {"prompt": "a", "num_images": 2},
        b"",
        b"not json",
        {"prompt": "b", "width": 512},
        {"prompt": "b", "out": "b.jpg"},
        {"prompt": "b", "out": "/proc/none/b.png", "num_images": 3},
        {"prompt": "c"},
    )
    code, out, _ = run("--prompts", "-", "--seed", 1)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(loaded) == 1
    assert [answer["line"] for answer in answers] == [1, 3, 4, 5, 6, 7]
    assert [image["path"] for image in answers[0]["images"]] == ["sdxl-1.png", "sdxl-2.png"]
    assert answers[0]["seconds"] > 0
    for answer, named in zip(answers[1:5], ["JSON", "width of 512", ".png", "cannot be written"], strict=True):
        assert named in answer["error"] and "\n" not in answer["error"] and "images" not in answer
    assert answers[5]["images"][0]["seed"] == 3  # a line that was refused takes no seeds


def test_an_answer_comes_before_the_next_line_is_sent(tmp_path, engine):
    """Through a real pipe: a caller may wait for each answer."""
    with spawn(engine, "-q", "--prompts", "-", "--out", f"{tmp_path}/out/", stdin=subprocess.PIPE) as process:
        for seed in (1, 2):
            process.stdin.write(b'{"prompt": "a", "seed": %d}\n' % seed)
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert Path(answer["images"][0]["path"]).is_file()
        process.stdin.close()
        assert process.wait(20) == 0


# -- engines ---------------------------------------------------------------------------------------


def test_sizes_choose_among_the_engines(run, loaded, tmp_path, engine):
    wide = stand_in_artifact(tmp_path / "wide", width=96, height=64)
    engines = f"{engine}\n{wide}"  # what "$(sdxl-build …)" gives for two resolutions
    for options, size in (((), (64, 64)), (("--width", 96), (96, 64)), (("--width", 64, "--height", 64), (64, 64))):
        _, out, _ = run("--prompt", "a", *options, engines=[engines])
        assert Image.open(out.strip()).size == size


def test_a_size_that_no_engine_makes_is_one_line(run, loaded, tmp_path, engine):
    wide = stand_in_artifact(tmp_path / "wide", width=96)
    code, _, err = run("--prompt", "a", "--width", 128, "--height", 64, "--quiet", engines=[engine, wide])
    assert code == 1 and not loaded
    assert one_line(err) == (
        "Error: No engine makes 128x64; the artifacts given make 64x64, 96x64. "
        "Build one: sdxl-build torch --model tiny --gpu cpu --resolution 128x64\n"
    )
    code, _, err = run("--prompt", "a", "--width", 100, "--quiet")
    assert code == 1 and "multiples of 8" in one_line(err)


def test_a_folder_that_is_no_artifact_is_one_line(run, loaded, tmp_path):
    for folder, named in ((tmp_path / "none", "does not exist"), (tmp_path, "no manifest.json"), ("", "is empty")):
        code, out, err = run("--prompt", "a", engines=[folder])
        assert (code, out) == (1, "") and named in one_line(err) and not loaded


def test_engines_may_come_from_the_environment(run, engine, tmp_path, monkeypatch):
    spaced = stand_in_artifact(tmp_path / "with space", width=96)
    monkeypatch.setenv("SDXL_ENGINE", f"{engine}{os.pathsep}{spaced}")
    monkeypatch.setenv("SDXL_OUT", "env.png")
    assert run("--prompt", "a", "--width", 96, engines=[])[:2] == (0, "env.png\n")


def test_the_expected_digest_lets_the_artifact_through(run, engine):
    digest = manifests.read(engine).digest
    for text in (digest, f"sha256:{digest.upper()}"):
        assert run("--prompt", "a", "--expect-digest", text)[0] == 0


def test_another_digest_stops_before_any_code_is_loaded(run, loaded, engine):
    code, out, err = run("--prompt", "a", "--expect-digest", "f" * 64)
    assert (code, out) == (1, "") and not loaded
    assert manifests.read(engine).digest in one_line(err) and "f" * 64 in err


def test_changed_code_stops_too_where_a_digest_is_expected(run, loaded, engine):
    (engine / "unet.cfg.pt2").write_bytes(b"evil")
    code, _, err = run("--prompt", "a", "--expect-digest", manifests.read(engine).digest)
    assert code == 1 and not loaded and "unet.cfg.pt2" in one_line(err)


def test_every_engine_needs_its_digest(run, loaded, engine, tmp_path):
    wide = stand_in_artifact(tmp_path / "wide", width=96)
    digests = [manifests.read(folder).digest for folder in (engine, wide)]
    assert run("--prompt", "a", "--expect-digest", digests[0], engines=[engine, wide])[0] == 1
    both = ("--expect-digest", digests[0], "--expect-digest", digests[1])
    assert run("--prompt", "a", *both, engines=[engine, wide])[0] == 0


# -- failing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--prompt", "a", "--prompts", "p.txt"),
        ("--prompt", "a", "--steps", "0"),
        ("--prompt", "a", "--steps", "x"),
        ("--prompt", "a", "--seed", "-1"),
        ("--prompt", "a", "--guidance", "nan"),
        ("--prompt", "a", "--guidance-until", "1.5"),
        ("--prompt", "a", "--num-images", "0"),
        ("--prompt", "a", "--scheduler", "heun"),
        ("--prompt", "a", "--strength", "1.5"),
        ("--prompt", "a", "--out", "fox.jpg"),
        ("--prompt", "a", "--out", "{sede}.png"),
        ("--prompt", "a", "--expect-digest", "123"),
        ("--prompt", "a \udce9"),
        ("--prompt", "a", "--nonsense"),
    ],
)
def test_wrong_usage_exits_2(run, loaded, options):
    code, out, err = run(*options)
    assert (code, out) == (2, "") and err.startswith("Usage: sdxl-run") and not loaded


def test_engine_is_required(run):
    assert run("--prompt", "a", engines=[])[0] == 2


def test_what_the_runtime_refuses_is_one_line(run, monkeypatch):
    def load(paths, **_):
        raise SdxlError("Built for sm90; this machine has sm86.", "Build it: sdxl-build torch")

    monkeypatch.setattr(runtimes, "load", load)
    assert run("--prompt", "a", "-q") == (
        1,
        "",
        "Error: Built for sm90; this machine has sm86. Build it: sdxl-build torch\n",
    )


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    for bug in (ZeroDivisionError("a bug"), ValueError("a bug"), EOFError("a bug")):

        def load(paths, bug=bug, **_):
            raise bug

        monkeypatch.setattr(runtimes, "load", load)
        with pytest.raises(type(bug), match="a bug"):
            run("--prompt", "a")


@pytest.mark.parametrize("out", ["/proc/none/fox.png", "/proc/none/"])
def test_a_place_that_cannot_be_written_is_found_before_loading(run, loaded, out):
    code, _, err = run("--prompt", "a", "-q", "--out", out)
    assert code == 1 and "/proc/none cannot be written" in one_line(err) and not loaded


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_disk_that_fills_up_is_one_line_and_keeps_what_is_saved(run, loaded, monkeypatch, form):
    write = Path.write_bytes

    def full_at_the_second(self, data):
        if "sdxl-2" in self.name:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full_at_the_second)
    code, out, err = run("--prompt", "a", "--num-images", 3, "--seed", 1, "-q", *form)
    assert code == 1 and "sdxl-2.png cannot be written: No space left on device" in one_line(err)
    if form:
        out = "".join(image["path"] + "\n" for image in json.loads(out)["images"])
    assert out == "sdxl-1.png\n"
    assert [path.name for path in Path().iterdir()] == ["sdxl-1.png"]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_ctrl_c_keeps_what_is_saved(run, monkeypatch, form):
    def interrupt(self, *args, **settings):
        if self.calls:
            raise KeyboardInterrupt
        return call(self, *args, **settings)

    call = StandInPipeline.__call__
    monkeypatch.setattr(StandInPipeline, "__call__", interrupt)
    code, out, err = run("--prompt", "a", "--num-images", 3, "--seed", 1, *form)
    assert code == 130 and "Interrupted; 1 picture is saved." in err and "Traceback" not in err
    if form:
        out = "".join(image["path"] + "\n" for image in json.loads(out)["images"])
    assert out == "sdxl-1.png\n" and Path("sdxl-1.png").is_file()


STANDING_IN = """
import time, runtimes
from tests.runtimes.stand_in import StandInPipeline
from runtimes import cli

def load(paths, **_):
    pipeline = StandInPipeline(paths)
    pipeline.before_call = lambda number: time.sleep(PAUSE if number else 0)
    return pipeline

runtimes.load = load
cli.main()
"""


def spawn(engine, *args, pause=0.0, **settings):
    """A real process with the stand-in pipeline, which waits ``pause`` seconds before every call but the first."""
    return subprocess.Popen(
        [sys.executable, "-c", STANDING_IN.replace("PAUSE", str(pause)), "--engine", str(engine), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **settings,
    )


def test_sigint_ends_with_130(engine):
    with spawn(engine, "--prompt", "a", "--num-images", "3", "--seed", "1", pause=30) as process:
        assert process.stdout.readline() == b"sdxl-1.png\n"
        time.sleep(2)  # well into the second picture, on a busy machine too
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Interrupted; 1 picture is saved." in err and b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_traceback(engine):
    with spawn(engine, "-q", "--prompt", "a", "--num-images", "3", "--seed", "1", pause=0.5) as process:
        assert process.stdout.readline() == b"sdxl-1.png\n"
        process.stdout.close()
        err = process.stderr.read()
        process.wait(20)
    assert err == b"" and process.returncode != 0


# -- start-up --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["--prompt", "a"], 2),
        (["--engine", "none", "--prompt", "a"], 1),
        (["--engine", "{engine}", "--prompt", "a", "--expect-digest", "0" * 64], 1),
        (["--engine", "{engine}", "--prompt", "a", "--width", "8"], 1),
    ],
)
def test_help_and_refusals_import_nothing_heavy(engine, args, code):
    script = (
        "import sys\nfrom runtimes import cli\n"
        "try: cli.main()\n"
        "finally: print([m for m in ('torch', 'numpy', 'PIL', 'rich', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *[arg.replace("{engine}", str(engine)) for arg in args]],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_gpu_that_is_chosen_for_an_artifact_of_the_cpu_is_refused(run, loaded):
    code, out, err = run("--prompt", "a", "--gpu-index", "0")
    assert (code, out) == (1, "") and not loaded
    assert "was built for cpu-avx2; it runs on no GPU. Leave --gpu-index out." in one_line(err)


def test_the_timeline_is_in_the_answer_and_shown_when_asked_for(run, loaded):
    code, out, err = run("--prompt", "a", "--seed", "1", "--json", "-v")
    spans = json.loads(out)["timeline"]
    assert code == 0
    assert {"python", "manifests", "import torch", "open artifact", "save"} <= {span["name"] for span in spans}
    assert all(0 <= span["start"] <= span["end"] for span in spans)
    assert "  import torch  " in err
    assert "import torch" not in run("--prompt", "a", "--seed", "2")[2]


def test_a_full_gpu_is_one_line(run, loaded, monkeypatch):
    def full(self, *_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    monkeypatch.setattr(StandInPipeline, "__call__", full)
    monkeypatch.setattr(StandInPipeline, "device", torch.device("cuda:0"), raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000_000_000, 85_000_000_000))
    code, out, err = run("--prompt", "a", "--seed", "1", "-q")
    assert (code, out) == (1, "")
    assert "no room for this picture: 1.00 GB of its 85.0 GB are free" in one_line(err) and "--vae tiny" in err


def test_only_a_run_that_ends_after_one_picture_records_no_graphs(run, loaded, monkeypatch):
    seen = []
    call = StandInPipeline.__call__

    def watched(self, *args, **settings):
        seen.append(cuda_graph._postponed.get())
        return call(self, *args, **settings)

    monkeypatch.setattr(StandInPipeline, "__call__", watched)
    monkeypatch.setattr(StandInPipeline, "device", torch.device("cuda:0"))
    assert run("--prompt", "a", "-q")[0] == 0 and seen == [True]
    assert run("--prompt", "a", "--num-images", 2, "-q")[0] == 0 and seen[1:] == [False, False]
    stdin(monkeypatch, {"prompt": "a"})
    assert run("--prompts", "-", "-q")[0] == 0 and seen[3:] == [False], "another line may follow"
