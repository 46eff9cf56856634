"""``docs/jobs.md`` shows the golden job specs as they are; ``INFL_UPDATE_GOLDEN=1`` writes it anew."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.presets import PresetLibrary

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "jobs.md"
GOLDEN = REPOSITORY / "tests" / "launcher" / "golden"
#: The presets that are shown in full, the first that a backend has; the others are linked.
SHOWN = ("alltoken-timing", "alltoken-2node")


@dataclass(frozen=True, slots=True)
class Backend:
    title: str
    what: str


BACKENDS: Mapping[str, Backend] = {
    "kubernetes": Backend(
        "A Job, for one machine",
        "`--backend kubernetes`: a `batch/v1` Job of one pod. KAI, Kueue and a namespace of Run:ai's are"
        " settings of it (`cluster.scheduler`), which only change labels and the scheduler's name.",
    ),
    "kuberay": Backend(
        "A RayJob, for several machines",
        "`--backend kuberay`: KubeRay makes a Ray cluster for each attempt and runs the trainer in its head.",
    ),
    "runai": Backend(
        "A training of Run:ai",
        "`--backend runai`: the body of the request to Run:ai's control plane. The two ids are looked up by"
        " name when it is sent.",
    ),
}

TOP = """# Job specs

<!-- Made from tests/launcher/golden by tests/docs/test_jobs.py; INFL_UPDATE_GOLDEN=1 makes it anew. -->

What `launcher render --preset NAME [--overlay NAME] --backend BACKEND` prints for the shipped presets.
The tests compare with the same files. `...` stands for what differs between two versions of the code: the
run document, which travels in `INFL_RUN_JSON`, and its hash.
"""


def page() -> str:
    return "\n".join([TOP, *(line for name in BACKENDS for line in _chapter(name))])


def _chapter(name: str) -> Iterator[str]:
    files = sorted((GOLDEN / name).glob("*.*"))
    if not files:
        return
    yield f"## {BACKENDS[name].title}\n"
    yield f"{BACKENDS[name].what}\n"
    yield from _shown(files)
    links = [f"[{file.stem}](../{file.relative_to(REPOSITORY).as_posix()})" for file in files]
    yield f"All of them: {', '.join(links)}.\n"


def _shown(files: list[Path]) -> Iterator[str]:
    by_name = {file.stem: file for file in files}
    file = next((by_name[name] for name in SHOWN if name in by_name), files[0])
    yield f"### {file.stem}\n"
    yield f"```{file.suffix.removeprefix('.')}\n{file.read_text().rstrip()}\n```\n"


def test_the_page_shows_the_golden_files_as_they_are() -> None:
    if os.environ.get("INFL_UPDATE_GOLDEN"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()


def test_every_backends_golden_files_are_shown_or_linked() -> None:
    folders = {path.name for path in GOLDEN.iterdir() if path.is_dir()}
    assert folders <= set(BACKENDS)
    text = PAGE.read_text()
    for folder in folders:
        for file in (GOLDEN / folder).iterdir():
            assert f"golden/{folder}/{file.name})" in text


def test_every_preset_is_there() -> None:
    text = PAGE.read_text()
    assert not [file.name for file in PresetLibrary().presets() if f"[{file.name}]" not in text]
