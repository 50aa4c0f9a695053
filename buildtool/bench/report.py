"""The answer of a measurement: JSON, a Markdown table, a bar chart, a contact sheet, and one page with all of it."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from buildtool.bench.cases import Result
from buildtool.bench.likeness import psnr, ssim
from buildtool.store.files import human_size

COLUMNS = (
    "case", "s a picture", "±", "steps/s", "load, s", "first call, + s", "first picture, s", "compilers, s", "memory",
    "GPU", "PSNR", "SSIM",
)  # fmt: skip
RIGHT = "right"
"""A further column, where pictures were judged by their prompts."""
THUMB, MARGIN, TEXT = 256, 12, 18
INK, PAPER, BAR = (32, 33, 36), (255, 255, 255), (66, 110, 180)

Row = tuple[str, ...]


def columns(results: Sequence[Result]) -> Row:
    return (*COLUMNS, RIGHT) if any(result.judged for result in results) else COLUMNS


def rows(results: Sequence[Result]) -> list[Row]:
    """The table, one row a case; likeness is the mean over prompts, to the first case's pictures."""
    count = len(columns(results))
    return [(*_row(result, *likeness(result, results[0])), right(result))[:count] for result in results]


def right(result: Result) -> str:
    """The share of judged pictures that show what their prompts say, ``75.0% of 4``."""
    judged = result.judged
    return f"{100 * sum(judged) / len(judged):.1f}% of {len(judged)}" if judged else "-"


def likeness(result: Result, reference: Result) -> tuple[float, float]:
    """Mean PSNR (dB) of the pictures that aren't equal, infinite if all are, and mean SSIM; NaN for another size."""
    pairs = list(zip(result.pictures, reference.pictures, strict=True))
    with Image.open(pairs[0][0]) as one, Image.open(pairs[0][1]) as two:
        if one.size != two.size:
            return math.nan, math.nan
    decibels = [value for value in (psnr(*pair) for pair in pairs) if math.isfinite(value)]
    mean = sum(decibels) / len(decibels) if decibels else math.inf
    return mean, sum(ssim(*pair) for pair in pairs) / len(pairs)


def _row(result: Result, decibels: float, similarity: float) -> Row:
    peak = result.peak_memory_bytes
    return (
        result.case.name,
        f"{result.mean:.3f}",
        "-" if result.spread is None else f"{result.spread:.3f}",
        f"{result.steps_per_second:.2f}",
        f"{result.load:.2f}",
        "-" if result.extra is None else f"{result.extra:.2f}",
        f"{result.first:.2f}",
        "-" if result.build is None else f"{result.build:.0f}",
        human_size(peak["process"]),
        human_size(peak["cuda"]) if "cuda" in peak else "-",
        "-" if math.isnan(decibels) else "equal" if math.isinf(decibels) else f"{decibels:.1f}",
        "-" if math.isnan(similarity) else f"{similarity:.3f}",
    )


def write(results: Sequence[Result], prompts: Sequence[tuple[str, int]], about: dict[str, Any], folder: Path) -> Path:
    """Writes ``results.json``, ``results.md``, ``times.png``, ``pictures.png`` and ``report.html``, which is returned.

    Args:
        about: what the page says of the machine and the command, by name.
    """
    head, table = columns(results), rows(results)
    (folder / "results.json").write_text(json.dumps(_as_json(results, prompts, about), indent=1) + "\n")
    (folder / "results.md").write_text(markdown(head, table))
    chart, sheet = bars(results), contact_sheet(results)
    chart.save(folder / "times.png")
    sheet.save(folder / "pictures.png")
    page = folder / "report.html"
    page.write_text(render(head, table, prompts, about, chart, sheet), encoding="utf-8")
    return page


def markdown(head: Row, table: Sequence[Row]) -> str:
    lines = [head, ("---",) * len(head), *table]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _as_json(results: Sequence[Result], prompts: Sequence[tuple[str, int]], about: dict[str, Any]) -> dict[str, Any]:
    told = []
    for result in results:
        decibels, similarity = likeness(result, results[0])
        told.append(
            {
                "case": result.case.name,
                "engine": str(result.case.folder),
                "options": dict(result.case.options),
                "peer": result.case.peer or None,
                "build_seconds": result.build,
                "load_seconds": result.load,
                "first_call_extra_seconds": result.extra,
                "first_picture_seconds": result.first,
                "seconds": result.seconds,
                "steps_per_second": result.steps_per_second,
                "peak_memory_bytes": result.peak_memory_bytes,
                "psnr": decibels if math.isfinite(decibels) else None,
                "ssim": similarity if math.isfinite(similarity) else None,
                "right": sum(result.judged) / len(result.judged) if result.judged else None,
                "right_pictures": result.right,
                "pictures": [str(picture) for picture in result.pictures],
            }
        )
    return {"about": about, "prompts": [{"prompt": p, "seed": s} for p, s in prompts], "cases": told}


def bars(results: Sequence[Result]) -> Image.Image:
    """Seconds a picture as horizontal bars."""
    font = ImageFont.load_default(TEXT)
    height, width, longest = 2 * TEXT + MARGIN + 8, 900, max(result.mean for result in results)
    picture = Image.new("RGB", (width, height * len(results) + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, result in enumerate(results):
        top = MARGIN + number * height
        draw.text((MARGIN, top), result.case.name, INK, font)
        length = round((width - 2 * MARGIN - 110) * result.mean / longest)
        draw.rectangle((MARGIN, top + TEXT + 6, MARGIN + max(length, 1), top + 2 * TEXT + 6), BAR)
        draw.text((MARGIN + length + 8, top + TEXT + 4), f"{result.mean:.3f} s", INK, font)
    return picture


def contact_sheet(results: Sequence[Result]) -> Image.Image:
    """A row of pictures for every case, its name above."""
    font = ImageFont.load_default(TEXT)
    columns, height = len(results[0].pictures), THUMB + TEXT + 2 * MARGIN
    width = max(columns * (THUMB + MARGIN) + MARGIN, 900)  # room for names
    sheet = Image.new("RGB", (width, len(results) * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, result in enumerate(results):
        top = MARGIN + number * height
        draw.text((MARGIN, top), result.case.name, INK, font)
        for column, path in enumerate(result.pictures):
            with Image.open(path) as picture:
                small = picture.convert("RGB")
                small.thumbnail((THUMB, THUMB))
                sheet.paste(small, (MARGIN + column * (THUMB + MARGIN), top + TEXT + 8))
    return sheet


def render(
    columns: Row,
    table: Sequence[Row],
    prompts: Sequence[tuple[str, int]],
    about: dict[str, Any],
    chart: Image.Image,
    sheet: Image.Image,
) -> str:
    """One HTML page with its pictures inside; nothing is loaded from elsewhere."""
    head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th scope=row>{html.escape(row[0])}</th>{''.join(f'<td>{html.escape(c)}</td>' for c in row[1:])}</tr>"
        for row in table
    )
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in about.items())
    judged = ""
    if RIGHT in columns:
        judged = " Right: the share of pictures that show what their prompts say, and nothing besides."
    asked = "".join(f"<li>{html.escape(text)} <small>seed {seed}</small></li>" for text, seed in prompts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>sdxl-bench</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 1rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse }}
th, td {{ padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #8886; white-space: nowrap }}
thead th {{ white-space: normal; vertical-align: bottom }}
th:first-child {{ text-align: left; white-space: normal; min-width: 9rem }}
tbody th {{ font-weight: normal }}
img {{ max-width: 100%; height: auto; background: #fff }}
dt {{ font-weight: 600 }}
</style></head><body>
<h1>sdxl-bench</h1>
<div class="wide" tabindex="0" role="region" aria-label="Results">
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p>Means of all pictures after a warm-up; ±: standard deviation. Load: from the process's start until it can be called;
first call: what that takes beyond a later one. Compilers: the seconds of all that the build started,
which run side by side. PSNR (dB) and SSIM compare with the first case's pictures.{judged}</p>
<h2>Seconds a picture</h2>
<img src="{_data(chart)}" alt="Bar chart of the seconds a picture in the table above">
<h2>Pictures</h2>
<img src="{_data(sheet)}" alt="The pictures of every case, a row each, a column for every prompt below">
<ol>{asked}</ol>
<h2>How it was measured</h2>
<dl>{facts}</dl>
</body></html>
"""


def _data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
