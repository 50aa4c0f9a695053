"""How alike two pictures are."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grey = NDArray[np.float64]


def luminance(path: Path) -> Grey:
    """A picture's luma (ITU-R BT.601), (H, W), 0…255."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"), dtype=np.float64)


def psnr(one: Path, two: Path) -> float:
    """Peak signal-to-noise ratio of the RGB values in dB, 10 log10(255² / mean squared difference); inf if equal."""
    with Image.open(one) as a, Image.open(two) as b:
        difference = np.asarray(a.convert("RGB"), dtype=np.float64) - np.asarray(b.convert("RGB"), dtype=np.float64)
    error = float(np.mean(difference**2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(one: Path, two: Path) -> float:
    """Mean structural similarity of the luma, -1…1.

    Wang et al. 2004, equation 13: a Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03.
    """
    x, y = luminance(one), luminance(two)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(np.mean(likeness))


def _blur(picture: Grey) -> Grey:
    """Gaussian mean around every pixel that has the whole window around it."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    for axis in (0, 1):
        views = np.lib.stride_tricks.sliding_window_view(picture, len(window), axis=axis)
        picture = views @ window
    return picture
