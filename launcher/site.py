"""The place that a command works at: a profile, its backend, and the run directories that are readable here.

On this machine the run directories are everything. A cluster may mount them where only its pods see them:
then the root is None, and what there is to know comes from the server.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from influence.rundir import RunPaths, validate_run_name
from launcher.backends import Backend, open_backend
from launcher.places import local_root, root_words, suggest
from launcher.profiles import LOCAL, Profile


@dataclass(frozen=True, slots=True)
class Site:
    """Make one with :meth:`open`."""

    profile: Profile
    backend: Backend
    options: tuple[str, ...] = ()
    """The options by which another command finds this place again."""

    @classmethod
    def open(cls, profile: Profile, root: Path | None = None) -> Site:
        """The place that a profile describes.

        Args:
            profile: ``local`` or a cluster's.
            root: the folder of run directories as given by flag; by default the profile's own.

        Raises:
            BackendError: as ``open_backend``.
        """
        if profile.backend == LOCAL:
            root = local_root(profile.root if root is None else root)
            options = (*profile.options, *root_words(root))
        else:
            options = (*profile.options, *(("--root", str(root)) if root is not None else ()))
            root = profile.root if root is None else root
        profile = replace(profile, root=root)
        return cls(profile, open_backend(profile), options)

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def local(self) -> bool:
        """Whether runs execute on this machine."""
        return self.profile.backend == LOCAL

    @property
    def root(self) -> Path | None:
        """The folder of run directories as this machine sees it."""
        return self.profile.root

    def paths(self, run: str) -> RunPaths | None:
        """The run directory as this machine sees it; None where it does not.

        Raises:
            RunNameError: not a name that a run can have.
            CorruptError: a link stands in its place.
        """
        if self.root is None:
            validate_run_name(run)
            return None
        return RunPaths.of(self.root, run)

    def suggest(self, *words: str, results: Path | None = None) -> str:
        """A command about this place, as ``launcher.places.suggest`` writes it."""
        return suggest(*words, *self.options, results=results)

    def __str__(self) -> str:
        """Where its runs are, in words."""
        return str(self.root) if self.local else f"cluster '{self.name}'"
