"""The wheel holds everything the launcher needs, and only declares what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_every_preset_and_template_travels_in_the_wheel(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = [
        *REPOSITORY.glob("jobs/**/*.yaml"),
        *REPOSITORY.glob("templates/**/*.j2"),
    ]
    assert len(sources) >= 6
    expected = {f"launcher/_data/{p.relative_to(REPOSITORY).as_posix()}" for p in sources}
    assert expected <= packed


def test_every_module_travels_in_the_wheel(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        p.relative_to(REPOSITORY).as_posix()
        for package in ("launcher", "influence")
        for p in (REPOSITORY / package).rglob("*.py")
    }
    assert modules <= packed
    assert not [name for name in packed if name.startswith("tests/")]


def test_base_requirements_leave_torch_and_verl_to_the_trainer_extra(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata_name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
    base = {
        r.split(">")[0].split("<")[0].split("=")[0]
        for r in metadata.get_all("Requires-Dist", [])
        if ";" not in r
    }
    assert base == {"click", "httpx", "jinja2", "kubernetes", "numpy", "pydantic", "pyyaml", "rich"}


def test_presets_resolve_from_the_installed_wheel_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "presets", "show", "alltoken-timing", "--overlay", "tiny-cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "accepted_minus_rejected" in done.stdout
    where = subprocess.run(
        [sys.executable, "-c", "import launcher; print(launcher.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(site))
