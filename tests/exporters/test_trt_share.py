"""What engines have in common is stored once, and every byte of each comes back: made-up engines and real ones."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from buildtool.store import manifest
from exporters import trt_share
from runtimes.trt_pieces import Pieces, is_split
from tests.conftest import Builder

MB = 1 << 20


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def share(folder: Path, engines: dict[str, bytes], known: dict[str, Path] | None = None) -> dict[str, Path]:
    """Splits engines as a build does, with the parts where an artifact has them."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    known = {} if known is None else known
    for name, data in engines.items():
        (folder / name).write_bytes(data)
        for digest, part in trt_share.split(folder / name, known).items():
            assert hashlib.sha256(part.read_bytes()).hexdigest() == digest
            known[digest] = part.rename(folder / trt_share.part_name("unet", digest))
    for name, data in engines.items():
        pieces = Pieces(folder / name, "unet")
        assert pieces.read(0, len(data)) == data
        assert pieces.sha256 == hashlib.sha256(data).hexdigest()
    return known


def test_the_first_engine_becomes_the_part_and_the_same_again_costs_nothing(tmp_path: Path) -> None:
    known = share(tmp_path, {"a.engine": noise(4 * MB, 0), "b.engine": noise(4 * MB, 0)})
    assert len(known) == 1
    assert (tmp_path / "a.engine").stat().st_size < 400 and (tmp_path / "b.engine").stat().st_size < 400


def test_weights_that_lie_elsewhere_are_found(tmp_path: Path) -> None:
    """The same weights after other code of another length, with a hole, and in another order."""
    first, second = noise(3 * MB, 0), noise(2 * MB, 1)
    known = share(
        tmp_path,
        {
            "a.engine": noise(100_000, 2) + first + second,
            "b.engine": noise(164_000, 3) + first + noise(64, 4) + second,
            "c.engine": second + noise(80_000, 5) + first,
        },
    )
    assert len(known) == 1
    assert (tmp_path / "b.engine").stat().st_size < 165_000
    assert (tmp_path / "c.engine").stat().st_size < 81_000


def test_much_that_one_engine_alone_has_becomes_a_part_too(tmp_path: Path) -> None:
    common, own = noise(4 * MB, 0), noise(MB, 1)
    known = share(tmp_path, {"cfg.engine": common, "nocfg.engine": own + common})
    assert [path.stat().st_size for path in known.values()] == [4 * MB, MB]
    share(tmp_path / "other", {}, known)
    known = {digest: path.rename(tmp_path / "other/weights" / path.name) for digest, path in known.items()}
    share(tmp_path / "other", {"nocfg.engine": noise(64, 7) + own + common}, known)
    assert len(known) == 2 and (tmp_path / "other/nocfg.engine").stat().st_size < 1000


def test_engines_without_anything_in_common_are_two_parts(tmp_path: Path) -> None:
    assert len(share(tmp_path, {"a.engine": noise(MB, 0), "b.engine": noise(MB, 1)})) == 2


def test_a_part_that_was_cut_out_at_odd_places_is_found_again(tmp_path: Path) -> None:
    """What only the second engine has ends in the middle of a word; what follows it in the part is still found."""
    one, two, common = noise(MB, 0), noise(2 * MB, 1), noise(4 * MB, 2)
    mixed = one + noise(5, 3) + common[5 : 2 * MB] + two
    known = share(tmp_path, {"cfg.engine": common, "nocfg.engine": mixed})
    assert len(known) == 2
    share(tmp_path, {"again.engine": noise(640, 7) + mixed}, known)
    assert len(known) == 2 and (tmp_path / "again.engine").stat().st_size < 2000


@pytest.mark.parametrize("size", [1, 7, 8, 4095, 70_000])
def test_small_files_and_constant_ones(tmp_path: Path, size: int) -> None:
    share(tmp_path, {"a.engine": noise(size, 0), "b.engine": b"\0" * size, "c.engine": b"\0" * size})


def test_any_range_can_be_read(tmp_path: Path) -> None:
    data = noise(90_000, 2) + noise(2 * MB, 0) + noise(70_000, 3)
    share(tmp_path, {"a.engine": noise(2 * MB, 0), "b.engine": data})
    pieces, draw = Pieces(tmp_path / "b.engine", "unet"), random.Random(1)
    for _ in range(200):
        at, size = draw.randrange(len(data) + 10), draw.randrange(300_000)
        assert pieces.read(at, size) == data[at : at + size]


def test_pieces_of_views_are_compared_to_the_byte() -> None:
    one = np.frombuffer(noise(3 * MB, 0), dtype=np.uint8)
    for differs in (0, 1, 4095, 4096, 100_001, 3 * MB - 1):
        two = one.copy()
        two[differs] ^= 1
        assert trt_share._same(one, two) == differs
    assert trt_share._same(one, one[: MB + 3]) == MB + 3


@pytest.mark.slow
def test_a_second_resolution_of_a_real_model_adds_code_and_no_weights(
    sdxl_build: Builder, tiny_trt_artifact: Path
) -> None:
    """tiny's code is large beside its weights; at full size 10 GB become 10 MB (docs/tensorrt.md)."""
    listed = manifest.read(tiny_trt_artifact)
    for name, component in listed.components.items():
        for form in component.variants.values():
            engine = tiny_trt_artifact / form.file
            assert is_split(engine)
            pieces, digest, at = Pieces(engine, name), hashlib.sha256(), 0
            while at < pieces.size:
                data = pieces.read(at, MB)
                at += len(data)
                digest.update(data)
            assert digest.hexdigest() == pieces.sha256
            parts = {trt_share.part_name(name, d) for d in trt_share.parts_of(engine)}
            assert parts <= listed.files.keys()
    cfg, nocfg = (set(trt_share.parts_of(tiny_trt_artifact / f"unet.{v}.engine")) for v in ("cfg", "nocfg"))
    assert cfg and cfg <= nocfg  # the variants share their weights; what nocfg has of its own may be nothing
