#!/usr/bin/env python3
"""Builds what the tests in tests/cluster need, once, and prints where each thing lies.

    controlplane.py [--optional] [controlplane | helm | crds]...      (none: all three)

``controlplane`` is etcd and Kubernetes' API server, controller manager and scheduler in one binary, ``helm``
is Helm, both built from the Go modules beside the tests; ``crds`` is a folder with the resource definitions
of KubeRay, Kueue and KAI, from their Go modules. All are kept in ``$XDG_CACHE_HOME/influence-launcher`` under
a hash of what decides their content, so only the first call takes time (three to five minutes, and 3 GB of
Go's own cache).

Exit codes: 0 printed; 1 the build failed; 69 Go is missing or too old (with ``--optional``: said, and 0).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests" / "cluster"
KUBERNETES_VERSION = "1.36.2"
MIN_GO = (1, 26)
#: From here on, Go's own encoding/json is a new one, with which Kubernetes' OpenAPI types do not work.
NEW_JSON_GO = (1, 27)
UNAVAILABLE = 69  # sysexits' EX_UNAVAILABLE


class NoGoError(Exception):
    """There is no Go that can build these things."""


class BuildError(Exception):
    """Go was there and failed; the message holds its last words."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--optional", action="store_true", help="without Go: say so and exit 0")
    parser.add_argument("what", nargs="*", metavar="controlplane | helm | crds", help="default: all three")
    options = parser.parse_args()
    unknown = set(options.what) - set(BUILDS)
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(BUILDS)}")
    try:
        for name in options.what or BUILDS:
            print(kept(name), flush=True)
    except NoGoError as error:
        print(f"controlplane: {error}; the tests in tests/cluster are skipped without it", file=sys.stderr)
        return 0 if options.optional else UNAVAILABLE
    except BuildError as error:
        print(f"controlplane: {error}", file=sys.stderr)
        return 1
    return 0


def kept(name: str) -> Path:
    """The path of a built thing, building it first where it is not there; two callers at once build it once.

    Raises:
        NoGoError: it must be built, and Go is missing or too old.
        BuildError: the build failed.
    """
    sources, inside, build = BUILDS[name]
    digest = hashlib.sha256()
    for source in (Path(__file__), *(TESTS / source for source in sources)):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "influence-launcher"
    folder = cache / f"{name}-{digest.hexdigest()[:16]}"
    if not folder.exists():
        go_version = require_go()
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{name}.lock"):
            if not folder.exists():
                print(
                    f"controlplane: building {name} (the first time takes minutes)",
                    file=sys.stderr,
                    flush=True,
                )
                with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as temporary:
                    unfinished = Path(temporary) / name
                    unfinished.mkdir()
                    build(unfinished, go_version)
                    unfinished.rename(folder)
    return folder / inside


def build_controlplane(folder: Path, go_version: tuple[int, int]) -> None:
    version = "k8s.io/component-base/version"
    major, minor, _ = KUBERNETES_VERSION.split(".")
    stamps = {"gitVersion": f"v{KUBERNETES_VERSION}", "gitMajor": major, "gitMinor": minor}
    flags = " ".join(["-s", "-w", *(f"-X {version}.{name}={value}" for name, value in stamps.items())])
    go_build("controlplane", ".", folder / "controlplane", flags, go_version)


def build_helm(folder: Path, go_version: tuple[int, int]) -> None:
    go_build("helm", "helm.sh/helm/v3/cmd/helm", folder / "helm", "-s -w", go_version)


def go_build(module: str, package: str, output: Path, link_flags: str, go_version: tuple[int, int]) -> None:
    environment = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": ""}
    if go_version >= NEW_JSON_GO:
        environment["GOEXPERIMENT"] = "nojsonv2"
    # -mod=readonly: what go.sum does not know is refused, never added.
    command = ["build", "-mod=readonly", "-buildvcs=false", "-trimpath", "-ldflags", link_flags]
    go([*command, "-o", str(output), package], TESTS / module, environment)


def copy_crds(folder: Path, _: tuple[int, int]) -> None:
    for project, pin in json.loads((TESTS / "crds.json").read_text()).items():
        download = json.loads(go(["mod", "download", "-json", pin["module"]], folder, {"GOFLAGS": ""}))
        if download["Sum"] != pin["sum"]:
            raise BuildError(
                f"{pin['module']} is {download['Sum']}; tests/cluster/crds.json says {pin['sum']}"
            )
        files = sorted(Path(download["Dir"]).glob(pin["files"]))
        if not files:
            raise BuildError(f"{pin['module']} has no {pin['files']}")
        (folder / project).mkdir()
        for file in files:
            shutil.copyfile(
                file, folder / project / file.name
            )  # not its mode: Go's module cache is read-only


#: name -> (the files that decide it, what of its folder is printed, how it is made)
BUILDS: Mapping[str, tuple[tuple[str, ...], str, Callable[[Path, tuple[int, int]], None]]] = {
    "controlplane": (
        ("controlplane/go.mod", "controlplane/go.sum", "controlplane/main.go"),
        "controlplane",
        build_controlplane,
    ),
    "helm": (("helm/go.mod", "helm/go.sum"), "helm", build_helm),
    "crds": (("crds.json",), "", copy_crds),
}


def require_go() -> tuple[int, int]:
    """The version of the Go that is here, as (1, 26).

    Raises:
        NoGoError: it is missing or older than the modules need.
    """
    needed = ".".join(map(str, MIN_GO))
    advice = f"install Go {needed} or newer (https://go.dev/dl) and have it on PATH"
    if shutil.which("go") is None:
        raise NoGoError(f"no Go here: {advice}")
    text = go(["env", "GOVERSION"], Path("/"), {"GOTOOLCHAIN": "local"}).strip()
    match = re.match(r"(?:devel )?go(\d+)\.(\d+)", text)
    if match is None or (int(match[1]), int(match[2])) < MIN_GO:
        raise NoGoError(f"{text or 'this Go'} is older than {needed}: {advice}")
    return int(match[1]), int(match[2])


def go(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    """What Go prints.

    Raises:
        BuildError: it failed.
    """
    done = subprocess.run(
        ["go", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        # With -json, Go tells its errors on standard output.
        words = "\n".join((done.stderr + done.stdout).strip().splitlines()[-15:])
        raise BuildError(f"go {arguments[0]} in {folder} failed with exit code {done.returncode}:\n{words}")
    return done.stdout


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which the kernel lets go of when this process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    raise SystemExit(main())
