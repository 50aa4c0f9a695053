"""``benchmarks/picture.py`` and ``throughput.py``: rows as they come, and what pictures are held against."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import drawing, picture, process, throughput
from benchmarks.drawing import Task
from benchmarks.picture import HEADERS, References, Row


def task(folder: Path, **fields: Any) -> Task:
    given = {"who": "ours", "artifact": "a", "precision": "fp32", "steps": 2, "guidance": 5.0, "untils": [1.0, 0.5]}
    given |= {"images": 3, "runs": 2, "warmup": 1, "gpu_index": 0, "folder": str(folder)}
    return Task(**{**given, **fields})


def setting(until: float) -> list[process.Event]:
    parts = {"encode": 0.1, "denoise": 0.7, "decode": 0.2}
    runs = [{"kind": "run", "seconds": seconds, "parts": parts} for seconds in (1.0, 3.0)]
    return [{"kind": "setting", "until": until}, {"kind": "first", "seconds": 9.0, "cached": False}, *runs]


def follow(monkeypatch: pytest.MonkeyPatch, told: list[process.Event], failure: str = "") -> list[Row]:
    def events(*_: Any) -> Any:
        yield from told
        if failure:
            raise process.Failed(failure)

    monkeypatch.setattr(process, "events", events)
    return list(picture.follow(task(Path()), "ours"))


def test_a_row_for_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = follow(monkeypatch, [*setting(1.0), {"kind": "made"}, *setting(0.5), {"kind": "made"}])
    assert (one.until, two.until, one.failure, two.failure) == (1.0, 0.5, "", "")
    assert one.seconds and one.seconds.median == 2.0 and one.pictures_per_second == 1.5
    cells = dict(zip(HEADERS, picture.render(one), strict=True))
    assert (cells["s"], cells["p10 to p90"], cells["denoise"]) == ("2.000", "1.000 to 3.000", "0.700")
    assert cells["latents' error"] == "not compared"


def test_what_was_measured_before_the_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [*setting(1.0), {"kind": "made"}, *setting(0.5)]
    one, two = follow(monkeypatch, told, "cut off: its 5 s were up")
    assert one.failure == "" and two.seconds and two.failure
    assert picture.render(two)[-1] == "after 2 calls: cut off: its 5 s were up"
    rows = follow(monkeypatch, told[:1], "cut off: its 5 s were up")  # in the first call of all
    assert [(row.until, row.seconds) for row in rows] == [(1.0, None), (0.5, None)]
    assert picture.render(rows[0])[2] == "failed" and len(picture.render(rows[0])) == len(HEADERS)
    (one, two) = follow(monkeypatch, [{"kind": "failed", "why": "SdxlError: no"}])
    assert one.failure == two.failure == "SdxlError: no"


def test_timed_calls_take_turns_with_other_prompts_and_end_with_those_that_are_compared(tmp_path: Path) -> None:
    asked: list[tuple[int, str]] = []

    def draw(requests: Any, until: float, output_type: str) -> Any:
        asked.append((requests[0][1], output_type))
        made = [Image.new("RGB", (2, 2), (seed, 0, 0)) for _, seed in requests]
        latents = np.zeros((len(requests), 4, 1, 1))
        return (latents if output_type == "latent" else made), dict.fromkeys(drawing.PARTS, 0.0)

    told: list[process.Event] = []
    drawing.measure(draw, task(tmp_path, runs=3), 1.0, told.append)
    golden, other = drawing.requests(3)[0][1], drawing.requests(3, turn=1)[0][1]
    assert [seed for seed, _ in asked] == [golden, other, golden, other, golden, golden]
    assert asked[-1][1] == "latent"
    assert [event["kind"] for event in told] == ["setting", "first", "run", "run", "run", "made"]
    assert not {*drawing.requests(3)} & {*drawing.requests(3, turn=1)}
    assert Image.open(task(tmp_path).file(1.0, "2.png")).getpixel((0, 0)) == (drawing.requests(3)[2][1], 0, 0)


def test_both_ends_of_a_batch_are_held_against_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = SimpleNamespace(weights={"unet": "a"}, vae="default", width=8, height=8)
    manifest: Any = SimpleNamespace(key=key)
    latents = np.arange(3 * 16, dtype=np.float32).reshape(3, 4, 2, 2)

    def save(where: Task, chosen: list[int], wrong: int | None = None) -> None:
        rows = latents.copy()
        for number, own in enumerate(chosen):
            Image.new("RGB", (8, 8), (40 * own + 100 * (own == wrong), 0, 0)).save(where.file(1.0, f"{number}.png"))
        if wrong is not None:
            rows[wrong] = 0
        np.save(where.file(1.0, "latents.npy"), rows[chosen])

    def drawn(reference: Task, name: str, *_: Any) -> Any:
        assert (reference.who, reference.precision) == ("reference", "fp32")
        save(reference, [0, 2])
        yield Row(name, False, 1.0, 3)

    monkeypatch.setattr(picture, "follow", drawn)
    (tmp_path / "0").mkdir()
    mine, references, row = task(tmp_path / "0", precision="fp16"), References("fp32"), Row("ours", True, 1.0, 3)
    references.draw(manifest, mine)
    references.draw(manifest, mine)  # once is enough
    save(mine, [0, 1, 2])
    references.compare(manifest, mine, row)
    assert (row.psnr, row.latents_error) == (float("inf"), 0.0)
    assert row.as_dict()["psnr"] == "equal" and picture.render(Row("a", True, 1.0, 1, failure="x"))[-1] == "x"
    save(mine, [0, 1, 2], wrong=2)
    references.compare(manifest, mine, row)
    assert row.psnr is not None and row.psnr < 20
    assert row.latents_error is not None and row.latents_error > 0.5


def test_no_artifact_and_no_fraction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert picture.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("Error: ")
    with pytest.raises(SystemExit):
        picture.main([str(tmp_path), "--guidance-until", "75"])
    assert {*throughput.HEADERS} == {*HEADERS} and throughput.HEADERS[2] == "pictures/s"


@pytest.mark.slow
def test_an_artifact_beside_eager(tiny_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two pictures a call through a batch of one: the chunks of both sides. One of the steps is not guided."""
    told = tmp_path / "told.json"
    words = ["--images", "2", "--steps", "2", "--runs", "1", "--warmup", "0", "--guidance-until", "0.4"]
    assert throughput.main([str(tiny_artifact), *words, "--peer", "eager", "--json", str(told)]) == 0
    found = json.loads(told.read_text())
    assert found["complete"] is True
    ours, theirs = found["rows"]
    assert ours["ours"] and not theirs["ours"]
    for row in (ours, theirs):
        assert row["failure"] == "" and len(row["runs"]) == 1 and row["latents_error"] < 1e-4
        assert row["psnr"] == "equal" or row["psnr"] > 50
        assert sum(sum(part) for part in row["parts"].values()) <= row["runs"][0] * 1.01
    assert (ours["ratio"], theirs["ratio"]) == (1.0, theirs["runs"][0] / ours["runs"][0])
    out = capfd.readouterr().out
    assert "| guided | by | pictures/s |" in out and "diffusers eager, channels-last, fp32" in out
