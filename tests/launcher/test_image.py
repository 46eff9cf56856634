"""``launcher image``: references and tags, the build command, and what can be said of an image from here."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import __version__
from launcher.errors import ExitCode, UsageError
from launcher.git import CodeVersion
from launcher.group import run
from launcher.image import (
    REVISION_LABEL,
    VERSION_LABEL,
    build_command,
    image_tag,
    tag_version,
)
from launcher.image_checks import Labels, image_checks, read_labels, version_is_known
from launcher.image_reference import ImageReference

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = "sha256:" + "5" * 64
CLEAN = CodeVersion(version="0.1.0", git_commit=COMMIT, dirty=False, diff_sha256=None)
DIRTY = CodeVersion(version="0.1.0", git_commit=COMMIT, dirty=True, diff_sha256="d" * 64)
WHEEL = CodeVersion(version="0.1.0", git_commit=None, dirty=None, diff_sha256=None)
NOBODY = Labels(None, "nobody was asked")

NAMES = st.from_regex(
    r"[a-z0-9]{1,5}((\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}(/[a-z0-9]{1,5}([._-][a-z0-9]{1,5})?){0,3}",
    fullmatch=True,
)
HOSTS = st.sampled_from(
    ["", "localhost/", "Registry/", "localhost:5000/", "registry.example.com:443/", "10.0.0.1:5000/"]
)
TAGS = st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
DIGESTS = st.none() | st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)


@given(host=HOSTS, name=NAMES, tag=TAGS, digest=DIGESTS)
def test_references_come_apart_and_together_again(
    host: str, name: str, tag: str | None, digest: str | None
) -> None:
    image = ImageReference(host + name, tag, digest)
    assert ImageReference.parse(str(image)) == image
    assert image.pull_name.count("@") == (digest is not None)
    assert digest is None or image.pull_name == f"{host}{name}@{digest}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "a:",
        "a@",
        "a@sha256:12",
        "-a",
        "a b",
        "a:b:c",
        "a/",
        "/a",
        "a$(x)",
        "ä",
        "a:b\n",
        "a@sha256:...",
        "Infl:1",
        "lab.example/Infl:1",
        "a..b",
        "a___b",
        "a-/b",
        "lab:x/infl",
        f"a@{DIGEST.upper()}",
        "a" * 256,
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no image reference"):
        ImageReference.parse(text)


VERSIONS = st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){1,2}(rc[0-9])?", fullmatch=True)


@given(
    version=VERSIONS, commit=st.none() | st.from_regex(r"[0-9a-f]{40}", fullmatch=True), dirty=st.booleans()
)
def test_our_tags_say_what_they_were_made_of(version: str, commit: str | None, dirty: bool) -> None:
    known = None if commit is None else dirty
    tag = image_tag(CodeVersion(version=version, git_commit=commit, dirty=known, diff_sha256=None))
    told = tag_version(tag)
    assert told is not None
    assert told.version == version
    assert told.dirty is bool(known)
    assert told.commit == (commit and commit[:12])


def test_a_local_versions_plus_becomes_a_tag() -> None:
    code = CodeVersion(version="0.1.0+cu130", git_commit=None, dirty=None, diff_sha256=None)
    assert image_tag(code) == "0.1.0_cu130"
    assert outcomes("team/infl:0.1.0_cu130", code)["tag"] == "ok"


# --- the build command


@given(
    host=HOSTS,
    name=NAMES,
    folder=st.text(min_size=1, max_size=20).filter(lambda t: "/" not in t and "\0" not in t),
)
def test_the_printed_command_is_one_shell_reads_back(host: str, name: str, folder: str) -> None:
    words = build_words(ImageReference(host + name, "old", None), CLEAN, folder)
    assert shlex.split(shlex.join(words)) == words
    assert words[-1] == str(Path("/src") / folder)


def build_words(image: ImageReference, code: CodeVersion, folder: str, push: bool = False) -> list[str]:
    class Checkout(type(Path())):  # type: ignore[misc]
        def is_file(self) -> bool:
            return True

    return list(build_command(image, code, Checkout("/src") / folder, push=push))


def test_the_command_names_version_commit_and_tag() -> None:
    words = build_words(ImageReference("example.com/infl", "old", DIGEST), DIRTY, "x", push=True)
    assert words == [
        *("docker", "buildx", "build", "--platform", "linux/amd64"),
        *("--build-arg", "VERSION=0.1.0", "--build-arg", f"REVISION={COMMIT}-dirty"),
        *("--tag", "example.com/infl:0.1.0-0123456789ab-dirty", "--push", "/src/x"),
    ]


def test_without_a_source_tree_the_error_says_where_to_get_one() -> None:
    with pytest.raises(UsageError) as caught:
        build_command(ImageReference("infl"), WHEEL, None, push=False)
    assert caught.value.next_step is not None
    assert "git clone" in caught.value.next_step


# --- what a reference and labels say


def outcomes(reference: str, code: CodeVersion = CLEAN, labels: Labels = NOBODY) -> dict[str, str]:
    return {
        check.name: check.outcome for check in image_checks(ImageReference.parse(reference), code, labels)
    }


@pytest.mark.parametrize(
    ("tag", "code", "outcome"),
    [
        ("0.1.0", CLEAN, "ok"),
        ("v0.1.0", CLEAN, "ok"),
        (f"0.1.0-{COMMIT[:12]}", CLEAN, "ok"),
        (f"0.1.0-{COMMIT[:12]}", WHEEL, "ok"),
        ("0.1.0-ffffffffffff", CLEAN, "warning"),
        (f"0.1.0-{COMMIT[:12]}", DIRTY, "warning"),
        (f"0.1.0-{COMMIT[:12]}-dirty", CLEAN, "warning"),
        (f"0.1.0-{COMMIT[:12]}-dirty", DIRTY, "ok"),
        ("0.2.0", CLEAN, "failed"),
        ("0.1.00", CLEAN, "failed"),
        (f"0.2.0-{COMMIT[:12]}", CLEAN, "failed"),
        ("latest", CLEAN, "unknown"),
        ("0.1.0-final", CLEAN, "unknown"),
        ("0.2.0-abc", CLEAN, "failed"),
        ("0.2.0-final", CLEAN, "failed"),
    ],
)
def test_tags(tag: str, code: CodeVersion, outcome: str) -> None:
    assert outcomes(f"example.com/infl:{tag}", code)["tag"] == outcome


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({VERSION_LABEL: "0.1.0", REVISION_LABEL: COMMIT}, ("ok", "ok")),
        ({VERSION_LABEL: "0.1.0"}, ("ok", None)),
        ({VERSION_LABEL: "0.1.0", REVISION_LABEL: "f" * 40}, ("ok", "warning")),
        ({VERSION_LABEL: "0.2.0", REVISION_LABEL: COMMIT}, ("failed", None)),
        ({"org.opencontainers.image.title": "ubuntu"}, ("unknown", None)),
        (None, ("unknown", None)),
    ],
)
def test_labels(labels: dict[str, str] | None, expected: tuple[str, str | None]) -> None:
    found = outcomes(f"infl@{DIGEST}", CLEAN, Labels(labels, "a tool"))
    assert (found["version label"], found.get("revision label")) == expected


def test_a_reference_without_a_digest_is_warned_of() -> None:
    assert outcomes("infl:0.1.0")["digest"] == "warning"
    assert outcomes(f"infl:0.1.0@{DIGEST}")["digest"] == "ok"


def test_unknown_is_not_agreement() -> None:
    checks = list(image_checks(ImageReference.parse(f"infl:latest@{DIGEST}"), CLEAN, NOBODY))
    assert not version_is_known(checks)
    assert not any(check.outcome == "failed" for check in checks)


# --- the tools


def tool(folder: Path, name: str, *, answer: object = None, error: str = "", code: int = 0) -> Path:
    """A program that notes its arguments and answers what it is told to."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    (folder / f"{name}.json").write_text(answer if isinstance(answer, str) else json.dumps(answer))
    (folder / f"{name}.error").write_text(error)
    program.write_text(
        "#!/bin/sh\n"
        f'printf "%s\\n" "$@" >> {shlex.quote(str(folder))}/{name}.words\n'
        f"cat {shlex.quote(str(folder))}/{name}.error >&2\n"
        f"cat {shlex.quote(str(folder))}/{name}.json\nexit {code}\n"
    )
    program.chmod(0o755)
    return folder / f"{name}.words"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


LABELS = {VERSION_LABEL: "0.1.0", REVISION_LABEL: COMMIT}


def test_skopeo_is_asked_for_the_digest(tools: Path) -> None:
    words = tool(tools, "skopeo", answer={"config": {"Labels": LABELS}})
    answer = read_labels(ImageReference("example.com/infl", "0.1.0", DIGEST))
    assert answer == Labels(LABELS, "skopeo, at the registry")
    assert words.read_text().split() == ["inspect", "--config", f"docker://example.com/infl@{DIGEST}"]


def test_the_next_tool_is_asked_where_one_refuses(tools: Path) -> None:
    tool(tools, "skopeo", error="first line\nunauthorized: authentication required\n", code=1)
    tool(tools, "crane", answer={"config": {"Labels": LABELS}})
    assert read_labels(ImageReference("infl")).told_by == "crane, at the registry"


def test_a_multi_platform_answer_is_read(tools: Path) -> None:
    tool(
        tools, "docker", answer={"linux/amd64": {"config": {"Labels": LABELS}}, "linux/arm64": {"config": {}}}
    )
    assert read_labels(ImageReference("infl")) == Labels(LABELS, "docker buildx, at the registry")


def test_a_tool_that_is_too_old_is_called_so(tools: Path) -> None:
    tool(tools, "docker", error="unknown flag: --format\nSee 'docker --help'.\n", code=125)
    told = read_labels(ImageReference("infl")).told_by
    assert "unknown flag" not in told and "docker buildx: the version that is installed here" in told


@pytest.mark.parametrize("answer", ["", "[]", "no json", '"text"'])
def test_a_strange_answer_is_told_and_never_a_traceback(tools: Path, answer: str) -> None:
    tool(tools, "skopeo", answer=answer)
    told = read_labels(ImageReference("infl"))
    assert told.labels is None
    assert told.told_by.startswith("skopeo: its answer is no JSON")


@pytest.mark.parametrize(
    "answer", [{}, {"config": None}, {"config": {"Labels": None}}, {"config": {"Labels": "x"}}]
)
def test_an_image_without_labels_has_none(tools: Path, answer: object) -> None:
    tool(tools, "skopeo", answer=answer)
    assert read_labels(ImageReference("infl")).labels == {}


def test_secrets_in_a_tools_words_stay_out(tools: Path) -> None:
    tool(tools, "crane", error="GET https://ada:hunter2@example.com/v2/: denied", code=1)
    told = read_labels(ImageReference("infl")).told_by
    assert "hunter2" not in told
    assert told.startswith("crane: ")


def test_no_tool_is_said(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tools))
    assert read_labels(ImageReference("infl")).told_by == "neither skopeo, crane nor docker is on PATH"


# --- the command


def image(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run(["image", *words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.git.code_version", lambda: CodeVersion(
        version=__version__, git_commit=COMMIT, dirty=False, diff_sha256=None))  # fmt: skip


def test_the_command_prints_one_line_that_builds_the_presets_image(
    capsys: pytest.CaptureFixture[str], clean: None
) -> None:
    code, out, err = image(capsys)
    assert code == ExitCode.OK
    words = shlex.split(out)
    assert words[:3] == ["docker", "buildx", "build"]
    assert f"influence-launcher:{__version__}-{COMMIT[:12]}" in words
    assert "sha256" in err
    assert out.count("\n") == 1


def test_the_image_is_the_clusters(capsys: pytest.CaptureFixture[str], clean: None, tmp_path: Path) -> None:
    config = tmp_path / "launcher.yaml"
    profile = {"backend": "kubernetes", "cluster": {"image": "registry.example.com/lab/infl:old"}}
    config.write_text(json.dumps({"clusters": {"lab": profile}}))
    code, out, _ = image(capsys, "--cluster", "lab", "--config", str(config), "-o", "json")
    assert (code, json.loads(out)["image"]) == (
        ExitCode.OK,
        f"registry.example.com/lab/infl:{__version__}-{COMMIT[:12]}",
    )
    assert image(capsys, "--cluster", "lub", "--config", str(config))[0] == ExitCode.USAGE


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str], clean: None) -> None:
    code, out, _ = image(capsys, "--image", "example.com/team/infl", "--push", "--output", "json")
    document = json.loads(out)
    assert (code, document["image"]) == (ExitCode.OK, f"example.com/team/infl:{__version__}-{COMMIT[:12]}")
    assert "--push" in document["command"]


@pytest.mark.parametrize(
    ("reference", "exit_code"),
    [
        (f"infl:{__version__}@{DIGEST}", ExitCode.OK),
        ("infl:9.9.9", ExitCode.SPEC),
        ("infl:latest", ExitCode.BACKEND),
        (f"infl@{DIGEST}", ExitCode.BACKEND),
    ],
)
def test_checking_exits_by_what_was_found(
    capsys: pytest.CaptureFixture[str], tools: Path, clean: None, reference: str, exit_code: int
) -> None:
    tools.joinpath("docker").write_text("#!/bin/sh\nexit 1\n")
    tools.joinpath("docker").chmod(0o755)
    code, out, _ = image(capsys, "--check", "--image", reference)
    assert code == exit_code
    assert ("could tell" in out) is (exit_code == ExitCode.BACKEND)
    code, out, _ = image(capsys, "--check", "--image", reference, "-o", "json")
    assert json.loads(out)["exit_code"] == code == exit_code


def test_a_label_overrules_a_silent_tag(capsys: pytest.CaptureFixture[str], tools: Path, clean: None) -> None:
    tool(tools, "skopeo", answer={"config": {"Labels": {VERSION_LABEL: __version__, REVISION_LABEL: COMMIT}}})
    assert image(capsys, "--check", "--image", "infl:latest")[0] == ExitCode.OK
    tool(tools, "skopeo", answer={"config": {"Labels": {VERSION_LABEL: "9.9.9"}}})
    assert image(capsys, "--check", "--image", f"infl:{__version__}")[0] == ExitCode.SPEC


@pytest.mark.parametrize(
    ("words", "exit_code", "place"),
    [
        (["--image", "a b"], ExitCode.USAGE, "--image"),
        (["--set", "cluster.image=a:b:c"], ExitCode.SPEC, "cluster.image"),
        (["--preset", "unheard-of"], ExitCode.USAGE, "unheard-of"),
        (["--check", "--push"], ExitCode.USAGE, "--push"),
    ],
)
def test_mistakes_are_named(
    capsys: pytest.CaptureFixture[str], clean: None, words: list[str], exit_code: int, place: str
) -> None:
    code, _, err = image(capsys, *words)
    assert code == exit_code
    assert place in err
