"""Pictures a second: a batch of prompts through artifacts that were built for it, ours and diffusers' side by side.

    python benchmarks/throughput.py "$(sdxl-build torch --model random:sdxl-base --vae fp16-fix --batch 8)" --peer eager
    python benchmarks/throughput.py DIR_B8 DIR_B8_FP8 --images 16 --peer eager

What is timed and compared is what picture.py times and compares: a call with a list of prompts, of which diffusers
gets as many at a time as the first artifact's batch. A row's pictures/s is the number of its pictures by the median.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import picture

HEADERS = ("guided", "by", "pictures/s", "s", *picture.HEADERS[3:5], *picture.HEADERS[6:])


def main(arguments: Sequence[str] | None = None) -> int:
    return picture.main(arguments, steps=20, description=__doc__, headers=HEADERS)


if __name__ == "__main__":
    raise SystemExit(main())
