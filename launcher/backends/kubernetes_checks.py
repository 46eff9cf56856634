"""What ``launcher doctor`` looks at on a Kubernetes cluster; nothing is created or changed.

What we may not look at is ``unknown``: the launcher's role holds what the launcher needs, and no more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from influence.rundir import RunSpec
from launcher.backends.kubernetes_api import KubernetesApi, Object
from launcher.backends.kubernetes_errors import (
    CHART,
    ApiConflict,
    ApiForbidden,
    ApiNotFound,
    ApiUnanswered,
    Target,
    api_path,
)
from launcher.backends.kubernetes_rights import POD_RIGHTS, SETTINGS, Rights, rights
from launcher.backends.kueue import API_VERSIONS
from launcher.doctor import Check, failed, unknown
from launcher.errors import LauncherError
from launcher.profiles import Profile

Outcome = Literal["ok", "warning", "failed"]

OLDEST_VERSION = (1, 31)  # podFailurePolicy is final from there on
KAI_QUEUES = "scheduling.run.ai/v2"
_RIGHTS: Rights = (("batch", "jobs", ("create", "get", "list", "watch", "patch")), *POD_RIGHTS)
KUEUE_RIGHTS = (("kueue.x-k8s.io", "workloads", ("get", "list", "patch")),)


def checks(profile: Profile, run: RunSpec | None) -> Iterator[Check]:
    """Look at everything that a run needs, one thing after the other.

    Args:
        profile: the cluster.
        run: what is to run there; None: what the profile's own settings name.

    Raises:
        BackendError: the kubeconfig cannot be used.
    """
    site = SiteView.open(profile, run)
    reached = site.reachable()
    yield reached
    if reached.outcome == "failed":
        return
    if not (yield from site.usable_namespace(_RIGHTS)):
        return
    yield from surroundings(site)
    if run is not None:
        from launcher.backends.kubernetes_room import room

        yield from room(site.api, profile.namespace, run)
        yield site.dry_run(run)


def surroundings(site: SiteView) -> Iterator[Check]:
    """What pods of a run refer to, whatever makes them."""
    if site.setting("scheduler") == "kueue":
        yield from rights(site.api, site.namespace, KUEUE_RIGHTS)
    for name in ("claim", "data_claim"):
        if site.setting(name) and not (name == "claim" and site.setting("storage", "claim") != "claim"):
            yield site.claim(str(site.setting(name)))
    if site.setting("service_account"):
        yield site.exists("service account", "v1", "serviceaccounts", str(site.setting("service_account")))
    yield from site.secrets()
    yield from site.queue()
    if site.setting("priority_class"):
        name = str(site.setting("priority_class"))
        yield site.exists("priority class", "scheduling.k8s.io/v1", "priorityclasses", name, namespaced=False)


@dataclass(frozen=True, slots=True)
class SiteView:
    """A cluster, looked at with the eyes of the launcher."""

    api: KubernetesApi
    namespace: str
    cluster: Mapping[str, Any]
    """The section ``cluster``, where one is known."""
    wandb_online: bool

    @classmethod
    def open(cls, profile: Profile, run: RunSpec | None) -> SiteView:
        settings = profile.settings if run is None else run.spec
        online = (settings.get("wandb") or {}).get("mode", "online") == "online"
        return cls(KubernetesApi(profile), profile.namespace, settings.get("cluster") or {}, online)

    def setting(self, name: str, default: Any = None) -> Any:
        """Of the section ``cluster``."""
        return self.cluster.get(name, default)

    def reachable(self) -> Check:
        try:
            version = self.api.get("/version")
        except ApiUnanswered as error:
            return failed("API server", error)
        except ApiForbidden as error:
            if error.status == 401:
                return failed("API server", error)
            return Check(name="API server", outcome="ok", detail=f"{self.api.place} answers")
        found = str(version.get("gitVersion", "of an unknown version"))
        detail = f"{self.api.place} answers, Kubernetes {found}"
        numbers = tuple(int(re.sub(r"\D", "", str(version.get(key))) or 0) for key in ("major", "minor"))
        if numbers < OLDEST_VERSION:
            return Check(
                name="API server", outcome="failed", detail=detail,
                next_step="runs need Kubernetes 1.31 or newer: a Job's podFailurePolicy",
            )  # fmt: skip
        return Check(name="API server", outcome="ok", detail=detail)

    def usable_namespace(self, wanted: Rights) -> Generator[Check, None, bool]:
        """Whether the namespace is there, and which rights we have in it.

        Returns:
            Whether it makes sense to look at what lies in it.
        """
        there = self._namespace_exists()
        yield there
        return there.outcome != "failed" and (yield from rights(self.api, self.namespace, wanted))

    def _namespace_exists(self) -> Check:
        return self._look(
            f"namespace {self.namespace}",
            api_path("v1", "namespaces", name=self.namespace),
            lambda item: (
                ("ok", "is there")
                if (item.get("status") or {}).get("phase") != "Terminating"
                else ("failed", "is being deleted")
            ),
            absent=f"create it, or correct cluster.namespace in {SETTINGS}",
        )

    def claim(self, name: str) -> Check:
        def judge(item: Object) -> tuple[Outcome, str]:
            phase = (item.get("status") or {}).get("phase")
            modes = ", ".join((item.get("spec") or {}).get("accessModes") or ["no access mode"])
            if phase == "Bound":
                alone = modes in ("ReadWriteOnce", "ReadWriteOncePod")
                words = f"bound, {modes}"
                return ("warning", f"{words}: one node at a time") if alone else ("ok", words)
            if phase == "Pending":
                return "warning", "not bound yet; fine where its storage class waits for the first pod"
            return "failed", f"is {phase}"

        path = api_path("v1", "persistentvolumeclaims", namespace=self.namespace, name=name)
        return self._look(
            f"claim {name}", path, judge,
            absent=f"the chart {CHART} makes it; or correct cluster.claim in {SETTINGS}",
        )  # fmt: skip

    def secrets(self) -> Iterator[Check]:
        """Those that the pods refer to; only the names of their keys are looked at."""
        name, keys = self.setting("secret"), []
        if self.wandb_online:
            keys.append("WANDB_API_KEY")
        if self.setting("storage") == "object_store" and "AWS_ACCESS_KEY_ID" not in (
            self.setting("environment") or {}
        ):
            keys += ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
        if name and keys:
            yield self._secret(str(name), keys)
        for pull_secret in self.setting("image_pull_secrets") or ():
            yield self._secret(str(pull_secret), [])

    def _secret(self, name: str, keys: list[str]) -> Check:
        def judge(item: Object) -> tuple[Outcome, str]:
            missing = [key for key in keys if key not in (item.get("data") or {})]
            if missing:
                return "failed", f"has no {', '.join(missing)}"
            return "ok", f"has {', '.join(keys)}" if keys else "is there"

        path = api_path("v1", "secrets", namespace=self.namespace, name=name)
        make = wrong = "create it"
        if keys:  # --from-file would keep a final line break, and a key with one is not accepted
            lines = ", ".join(f"{key}=..." for key in keys)
            words = f"kubectl create secret generic {name} -n {self.namespace} --from-env-file=secrets.env"
            make = f"`{words}`, a file with the lines {lines}"
            wrong = f"`{words} --dry-run=client --output=yaml | kubectl apply -f -`, with the lines {lines}"
        return self._look(
            f"secret {name}", path, judge, absent=make, wrong=wrong,
            hidden="whoever may see a Secret may read it, so the launcher's role leaves that out; a pod that "
            "misses one says so",
        )  # fmt: skip

    def queue(self) -> Iterator[Check]:
        name, scheduler = self.setting("queue"), self.setting("scheduler")
        if not name:
            return
        if scheduler == "kai":
            yield self.exists("KAI queue", KAI_QUEUES, "queues", str(name), namespaced=False)
        elif scheduler == "kueue":
            yield self._kueue_queue(str(name))

    def _kueue_queue(self, name: str) -> Check:
        *older, newest = (
            api_path(version, "localqueues", namespace=self.namespace, name=name) for version in API_VERSIONS
        )

        def ask(newest: str) -> Object:
            for path in older:
                try:
                    return self.api.get(path)
                except ApiNotFound:
                    continue
            return self.api.get(newest)

        def judge(item: Object) -> tuple[Outcome, str]:
            conditions = (item.get("status") or {}).get("conditions") or []
            inactive = [c for c in conditions if c.get("type") == "Active" and c.get("status") == "False"]
            if inactive:
                return "failed", f"takes no work: {inactive[0].get('message')}"
            return "ok", "is there"

        return self._look(
            f"Kueue's queue {name}", newest, judge, ask=ask,
            absent="ask the administrator for a LocalQueue in this namespace, or correct cluster.queue",
        )  # fmt: skip

    def exists(
        self, what: str, group_version: str, resource: str, name: str, *, namespaced: bool = True
    ) -> Check:
        """Whether an object is there."""
        namespace = self.namespace if namespaced else None
        path = api_path(group_version, resource, namespace=namespace, name=name)
        return self._look(
            f"{what} {name}", path, lambda _: ("ok", "is there"),
            absent=f"have it created, or correct the name in {SETTINGS}",
        )  # fmt: skip

    def dry_run(self, run: RunSpec) -> Check:
        """What the server would say to the Job, with every admission check that it has."""
        from launcher.kubernetes_values import TEMPLATE, job_values
        from launcher.render import parse_manifest, render_template

        name = "the Job"
        try:
            manifest = parse_manifest(render_template(TEMPLATE, job_values(run)), TEMPLATE)
            path = api_path("batch/v1", "jobs", namespace=self.namespace)
            self.api.ask(path, manifest, dryRun="All")
        except ApiConflict:
            return Check(name=name, outcome="ok", detail=f"'{run.run}' is there already")
        except ApiForbidden as error:
            return unknown(name, error)
        except LauncherError as error:
            return failed(name, error)
        return Check(name=name, outcome="ok", detail="the server would take it (dry run)")

    def _look(
        self,
        name: str,
        path: str,
        judge: Callable[[Object], tuple[Outcome, str]],
        *,
        ask: Callable[[str], Object] | None = None,
        absent: str,
        wrong: str | None = None,
        hidden: str | None = None,
    ) -> Check:
        """Get something and judge it.

        Args:
            ask: for what may lie at other paths too.
            absent: what to do where it is not there.
            wrong: what to do where it is not as it should be.
            hidden: why we may not be allowed to look.
        """
        try:
            outcome, detail = judge((ask or self.api.get)(path))
        except ApiNotFound:
            return Check(name=name, outcome="failed", detail="is not there", next_step=absent)
        except ApiForbidden as error:
            target = Target.of(path)
            within = f" -n {target.namespace}" if target.namespace else ""
            told_by = f"ask somebody who may: `kubectl get {target.kind} {target.name}{within}`"
            return unknown(name, error, hidden, told_by)
        except LauncherError as error:
            return failed(name, error)
        next_step = (wrong or absent) if outcome == "failed" else None
        return Check(name=name, outcome=outcome, detail=detail, next_step=next_step)
