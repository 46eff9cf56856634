"""Volumes are folders. There is no mount namespace: what begins with a mount path is rewritten instead.

An argument (``/artifacts/run``, ``--out=/artifacts/run``), a variable's value or a working directory that
begins with a container's mount path begins with the volume's folder when its process sees it. Paths inside of
longer texts, such as a run document or a shell script, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def folders(
    pod: Json, container: Json, pod_folder: Path, claim_folder: Callable[[str], Path]
) -> dict[str, Path]:
    """Mount path -> folder, which exists then. ``claim_folder`` gives a claim's.

    Raises:
        LookupError: a volume is of a kind that the bench doesn't have, or its claim isn't there.
    """
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
    found = {}
    for mount in container.get("volumeMounts", []):
        volume = volumes[mount["name"]]
        if "persistentVolumeClaim" in volume:
            folder = claim_folder(volume["persistentVolumeClaim"]["claimName"])
        elif "hostPath" in volume:
            folder = Path(volume["hostPath"]["path"])
        elif "emptyDir" in volume or "projected" in volume:  # projected: a token, which no process here uses
            folder = pod_folder / "volumes" / mount["name"]
        else:
            kind = next((key for key in volume if key != "name"), "none")
            raise LookupError(f"volume {mount['name']!r} is of kind {kind}, which this kubelet does not have")
        folder = folder / mount.get("subPath", "")
        folder.mkdir(parents=True, exist_ok=True)
        found[mount["mountPath"].rstrip("/")] = folder
    return found


def rewritten(text: str, mounts: Mapping[str, Path]) -> str:
    """The text with a mount path at its beginning, or after ``--option=``, replaced by the folder."""
    option, equals, value = text.partition("=") if text.startswith("-") else ("", "", text)
    for path in sorted(mounts, key=len, reverse=True):
        if value == path or value.startswith(f"{path}/"):
            return f"{option}{equals}{mounts[path]}{value[len(path) :]}"
    return text
