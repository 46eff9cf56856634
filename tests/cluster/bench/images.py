"""Images are folders whose ``bin`` comes first on the PATH of a container; one that nobody made has none.

Every container finds the tests' own Python and this checkout anyway. So ``python -m influence.train`` is the
real trainer, unless an image brings a ``python`` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote


def image_folder(bench_folder: Path, image: str) -> Path:
    """Where an image lies, or would."""
    return bench_folder / "images" / quote(image, safe="")


def make_image(bench_folder: Path, image: str, programs: Mapping[str, str]) -> Path:
    """Makes an image of programs (name -> script, with its ``#!`` line); returns its folder."""
    folder = image_folder(bench_folder, image)
    (folder / "bin").mkdir(parents=True)
    for name, script in programs.items():
        program = folder / "bin" / name
        program.write_text(script)
        program.chmod(0o755)
    return folder
