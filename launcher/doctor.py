"""What runs need of a place, checked one by one against the real thing: ``launcher doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from launcher.backends import import_for
from launcher.errors import LauncherError
from launcher.profiles import LOCAL, Profile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from influence.rundir import RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    """What, in a few words: ``claim infl-artifacts``."""
    outcome: Literal["ok", "failed", "warning", "unknown"]
    """``failed``: a run cannot succeed; ``warning``: it may not; ``unknown``: it could not be found out."""
    detail: str
    """What was found, in words; never a secret."""
    next_step: str | None = None
    """What to do about it, where something is to be done."""


def examine(profile: Profile, run: RunSpec | None) -> Iterator[Check]:
    """Look at a place, as the launcher would use it.

    Each backend has a module ``launcher.backends.<backend>_checks`` with ``checks(profile, run)``; an error
    that ends it is one more check that failed.

    Args:
        run: what is to run there; None for what every run needs.
    """
    yield Check(name="profile", outcome="ok", detail=_described(profile))
    if run is not None and profile.backend != LOCAL:
        yield from _image_and_data(run)
    try:
        owner = import_for(profile.backend, f"launcher.backends.{profile.backend}_checks")
        yield from owner.checks(profile, run)
    except LauncherError as error:
        yield failed(f"backend {profile.backend}", error)


def failed(name: str, error: LauncherError) -> Check:
    """A check that an error ended."""
    detail = f"{error.what}: {error.why}" if error.why else error.what
    return Check(name=name, outcome="failed", detail=detail, next_step=error.next_step)


def unknown(
    name: str, error: LauncherError, hidden: str | None = None, next_step: str | None = None
) -> Check:
    """A check that we may not make; nothing is wrong for that.

    Args:
        hidden: why not, in better words than the error's.
        next_step: who or what can tell; by default how to get the right.
    """
    return Check(
        name=name,
        outcome="unknown",
        detail="cannot be seen from here: " + (hidden or error.what),
        next_step=next_step or error.next_step,
    )


def summary(checks: Sequence[Check]) -> str:
    """What all checks come to, in a line: what could not be looked at is no good news."""
    num = {
        outcome: sum(check.outcome == outcome for check in checks)
        for outcome in ("failed", "warning", "unknown")
    }
    words = [f"{num['failed']} of {len(checks)} checks failed"]
    if num["warning"]:
        words.append(f"{num['warning']} warn")
    if num["unknown"]:
        words.append(f"{num['unknown']} could not be made")
    return ", ".join(words) if any(num.values()) else f"all {len(checks)} checks passed"


def _image_and_data(run: RunSpec) -> Iterator[Check]:
    """What the settings alone say of the pods' image, whatever the cluster."""
    from launcher.image_checks import pinned
    from launcher.image_reference import ImageReference
    from launcher.kubernetes_values import unmet_needs

    text = str(run.spec["cluster"]["image"])
    try:
        check = pinned(ImageReference.parse(text))
        yield replace(check, name="image", detail=f"{text}: {check.detail}")
    except ValueError as error:  # a spec of an older launcher
        yield Check(name="image", outcome="failed", detail=str(error), next_step="correct cluster.image")
    for need in unmet_needs(run):
        yield Check(
            name="data",
            outcome="warning",
            detail=need,
            next_step="name the claim that holds them: cluster.data_claim in launcher.yaml",
        )


def _described(profile: Profile) -> str:
    if profile.backend == LOCAL:
        return "this machine"
    place = [f"namespace {profile.namespace}"]
    if profile.runai is not None:
        place.insert(0, f"{profile.runai.url}, project {profile.runai.project}")
    if profile.context is not None:
        place.insert(0, f"context {profile.context}")
    source = f" ({profile.source})" if profile.source else ""
    return f"cluster '{profile.name}', {profile.backend}, {', '.join(place)}{source}"
