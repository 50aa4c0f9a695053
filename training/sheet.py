"""Sheets of pictures, to look at while a model trains."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def write_sheet(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """`pictures`: uint8 [n, h, w, 3]. Writes one PNG of `columns` pictures a row with a thin border."""
    from PIL import Image

    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = torch.full((rows * (height + 4), columns * (width + 4), 3), 90, dtype=torch.uint8)
    for number in range(count):
        top, left = number // columns * (height + 4) + 2, number % columns * (width + 4) + 2
        sheet[top : top + height, left : left + width] = pictures[number]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.numpy()).save(path)
