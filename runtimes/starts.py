"""Picture files that runs start from. Checked before torch is imported."""

from pathlib import Path
from typing import Any

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest


def check(path: str, manifest: Manifest) -> None:
    """Raises:
    SdxlError: there is no such file, or the artifact can't read pictures.
    """
    if not Path(path).is_file():
        raise SdxlError(f"The picture {path} does not exist.", "Give the file of a picture: --image photo.png")
    require_encoder(manifest)


def require_encoder(manifest: Manifest) -> None:
    """Raises:
    SdxlError: the artifact was built without a VAE encoder, so it can't read pictures.
    """
    if "vae_encoder" not in manifest.components:
        import shlex

        raise SdxlError(
            "The artifact has no VAE encoder, which a picture to start from needs.",
            f"Build it with one: {shlex.join([*manifest.command, '--with-encoder'])}",
        )


def read(path: str) -> Any:
    """The picture, a PIL image.

    Raises:
        SdxlError: it is no picture, or cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, Image.DecompressionBombError) as error:
        raise SdxlError(f"The picture {path} cannot be read: {error}.") from None
