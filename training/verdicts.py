"""The judge, and held-out prompts, for programs that don't import this package: JSON lines in, JSON out.

    python -m training.verdicts                     # stdin: {"prompt": …, "picture": PATH} a line
    python -m training.verdicts --prompts 50 --size 256x256

The first prints a list: for each line whether the picture shows what its prompt says and nothing besides, null where
the prompt names no thing of this world. The second prints prompts that nothing was trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable

import numpy as np
from PIL import Image

from training.captions import read
from training.judge import judge


def right(lines: Iterable[str]) -> list[bool | None]:
    """A verdict for each line of JSON; None for a prompt that names nothing."""
    found: list[bool | None] = []
    for line in lines:
        asked = json.loads(line)
        scene = read(asked["prompt"])
        if not scene.things:
            found.append(None)
            continue
        with Image.open(asked["picture"]) as picture:
            found.append(judge(np.asarray(picture.convert("RGB")), scene).right)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, metavar="N", help="print N held-out prompts instead")
    parser.add_argument("--size", default="256x256", metavar="WxH", help="of the pictures they are for")
    options = parser.parse_args(arguments)
    if options.prompts is None:
        print(json.dumps(right(sys.stdin)))
        return
    from training.scoring import held_out_prompts

    width, height = (int(part) for part in options.size.split("x"))
    print(json.dumps(held_out_prompts(options.prompts, 0, width, height)))


if __name__ == "__main__":
    main()
