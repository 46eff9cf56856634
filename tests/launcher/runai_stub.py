"""A control plane of Run:ai over real HTTP, as far as trainings are documented; it misbehaves on demand.

Written from the API's description and without the client: paths, field names and phases are spelled out here
again. What no description tells is chosen, and said here: names are unique among the workloads of a project
that are not deleted (409), a deleted workload keeps its last phase, and deletion takes effect at once unless
`graceful`. Without `unique_names` it creates whatever it is told to.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
import urllib.parse
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CLIENT_ID = "client-of-the-tests"
CLIENT_SECRET = "s3cret&value/of+the tests"  # noqa: S105
CLUSTER_ID = "71f69d83-ba66-4822-adf5-55ce55efd210"
PROJECT, PROJECT_ID = "lab", "4501"

# What a training's spec may hold; anything else is refused, so that a misspelled field is noticed.
_SPEC_FIELDS = frozenset(
    ("annotations", "args", "autoDeletionTimeAfterCompletionSeconds", "backoffLimit", "category", "command",
     "completions", "compute", "createHomeDir", "environmentVariables", "exposedUrls", "image",
     "imagePullPolicy", "imagePullSecrets", "labels", "nodeAffinityRequired", "nodePools", "nodeType",
     "parallelism", "podAffinity", "ports", "preemptibility", "priorityClass", "probes", "relatedUrls",
     "restartPolicy", "security", "stdin", "storage", "terminateAfterPreemption",
     "terminationGracePeriodSeconds", "tolerations", "tty", "workingDir")
)  # fmt: skip
_OPERATORS = ("==", "!=", "<=", ">=", "=@", "!@", "=^", "=$")


@dataclass(slots=True)
class Fault:
    """How the next request that matches is treated.

    Attributes:
        kind: a status (``502``), a body with status 200 (``html``, ``not-json``, ``shape``, ``huge``,
            ``empty``), or ``reset``, ``silent`` (no answer), ``trickle`` (an answer without an end),
            ``drip`` (headers that take two seconds).
        after: whether the request is carried out first.
        method, part: which requests; ``part`` is part of the path.
        headers: further headers of the answer.
        body: instead of the kind's own.
        times: for how many requests it holds.
    """

    kind: str
    after: bool = False
    method: str | None = None
    part: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    times: int = 1

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in (None, method) and self.part in path


class RunaiStub:
    """The state and the server; use it as a context manager."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.workloads: list[dict[str, Any]] = []
        self.pods: dict[str, list[dict[str, Any]]] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.projects: list[dict[str, Any]] = [
            {"id": "4500", "name": "lab-two", "clusterId": CLUSTER_ID},
            {
                "id": PROJECT_ID, "name": PROJECT, "clusterId": CLUSTER_ID,
                "totalResources": {"gpuQuota": 16},
                "status": {"phase": "Ready", "namespace": "runai-lab"},
            },
        ]  # fmt: skip
        self.clusters: list[dict[str, Any]] = [{"uuid": CLUSTER_ID, "name": "hall-1"}]
        self.nodepools: list[dict[str, Any]] = [
            {"name": "default", "clusterId": CLUSTER_ID, "phase": "Ready"},
            {"name": "h200", "clusterId": CLUSTER_ID, "phase": "Ready"},
        ]
        self.tokens: set[str] = set()
        self.all_tokens: list[str] = []
        self.token_lifetime_s = 3600
        self.tells_variables = True
        self.ignores_filters = False
        self.graceful = False
        self.unique_names = True
        self.page_limit = 500
        self.refused_methods: set[tuple[str, str]] = set()
        self.stopping = threading.Event()

    def __enter__(self) -> RunaiStub:
        stub = self

        class Handler(_Handler):
            control_plane = stub

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def live(self, name: str | None = None) -> list[dict[str, Any]]:
        """The workloads that are not deleted."""
        return [w for w in self.workloads if w["deletedAt"] is None and name in (None, w["name"])]

    def set_phase(self, name: str, phase: str, message: str = "", pods: int = 0, reason: str = "") -> None:
        """Let a workload come into another phase."""
        with self.lock:
            for workload in self.live(name):
                workload |= {"phase": phase, "phaseMessage": message, "phaseReason": reason or None}
                workload["runningPods"] = pods

    def expire_tokens(self) -> None:
        """Let every token given so far be refused."""
        self.tokens.clear()

    def calls(self, method: str, part: str = "") -> int:
        """How many requests there were of a method, with ``part`` in the path."""
        return sum(1 for m, path, _ in self.requests if m == method and part in path)

    def add(
        self, name: str, *, project: str = PROJECT, phase: str = "Running", **extra: Any
    ) -> dict[str, Any]:
        """A workload that somebody made."""
        ids = {each["name"]: each["id"] for each in self.projects}
        workload = {
            "id": str(uuid.uuid4()), "name": name, "projectName": project, "projectId": ids[project],
            "clusterId": CLUSTER_ID, "type": "training", "phase": phase, "phaseMessage": "",
            "phaseReason": None, "createdAt": _now(), "deletedAt": None, "completedAt": None,
            "runningPods": 0, "spec": {},
        } | extra  # fmt: skip
        self.workloads.append(workload)
        return workload

    # The control plane's own answers: status and document.

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        match method, parts:
            case "GET", ["api", "v1", "org-unit", "projects"]:
                return self._listing("projects", self._filtered(self.projects, query), query)
            case "GET", ["api", "v1", "clusters"]:
                return 200, self.clusters
            case "GET", ["api", "v1", "node-pools"]:
                return self._listing("nodepools", self._filtered(self.nodepools, query), query)
            case "GET", ["api", "v1", "workloads"]:
                deleted = query.get("deleted") == "true"
                chosen = [
                    w
                    for w in self.workloads
                    if self.ignores_filters or (w["deletedAt"] is not None) == deleted
                ]
                if query.get("sortOrder") == "desc":
                    chosen.reverse()
                entries = [self._entry(w) for w in self._filtered(chosen, query)]
                return self._listing("workloads", entries, query)
            case "GET", ["api", "v1", "workloads", "trainings", id_]:
                return self._training(id_)
            case "POST", ["api", "v1", "workloads", "trainings"]:
                return self._create(body)
            case "DELETE", ["api", "v1", "workloads", "trainings", id_]:
                return self._delete(id_)
            case "POST", ["api", "v1", "workloads", "trainings", id_, ("suspend" | "resume") as verb]:
                return self._order(id_, verb)
            case "GET", ["api", "v1", "workloads", id_, ("pods" | "events" | "history") as kind]:
                if not any(w["id"] == id_ for w in self.workloads):
                    return 404, {"code": 404, "message": "workload not found"}
                kept = {"pods": self.pods, "events": self.events, "history": self.history}[kind]
                key = "records" if kind == "history" else kind
                return self._listing(key, kept.get(id_, []), query)
        return 404, {"code": 404, "message": "no such endpoint"}

    def _listing(self, key: str, items: list[Any], query: dict[str, str]) -> tuple[int, Any]:
        limit = min(int(query.get("limit", 50)), self.page_limit)
        offset = int(query.get("offset", 0))
        answer: dict[str, Any] = {key: items[offset : offset + limit]}
        if offset + limit < len(items):
            answer["next"] = offset + limit
        return 200, answer

    def _filtered(self, items: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
        if self.ignores_filters or not query.get("filterBy"):
            return list(items)
        kept = list(items)
        for condition in query["filterBy"].split(","):
            operator = next(op for op in _OPERATORS if op in condition)
            name, _, wanted = condition.partition(operator)
            test = {
                "==": lambda v, w: v == w, "!=": lambda v, w: v != w, "=@": lambda v, w: w in v,
                "!@": lambda v, w: w not in v, "=^": str.startswith, "=$": str.endswith,
                "<=": lambda v, w: v <= w, ">=": lambda v, w: v >= w,
            }[operator]  # fmt: skip
            kept = [item for item in kept if test(str(item[name]), wanted)]
        return kept

    def _entry(self, workload: dict[str, Any]) -> dict[str, Any]:
        entry = {key: value for key, value in workload.items() if key != "spec"}
        if self.tells_variables:
            variables = workload["spec"].get("environmentVariables", [])
            entry["environmentVariables"] = {v["name"]: v["value"] for v in variables if "value" in v}
        return entry

    def _find(self, id_: str) -> dict[str, Any] | None:
        return next((w for w in self.workloads if w["id"] == id_), None)

    def _training(self, id_: str) -> tuple[int, Any]:
        workload = self._find(id_)
        if workload is None or workload["type"] != "training":
            return 404, {"code": 404, "message": "training not found"}
        return 200, {
            "name": workload["name"], "requestedName": workload["name"], "workloadId": id_,
            "projectId": workload["projectId"], "clusterId": workload["clusterId"], "createdBy": "tests",
            "createdAt": workload["createdAt"], "deletedAt": workload["deletedAt"], "desiredPhase": "Running",
            "actualPhase": workload["phase"], "spec": workload["spec"],
        }  # fmt: skip

    def _create(self, body: Any) -> tuple[int, Any]:
        wanted = {"name", "projectId", "clusterId"}
        if not isinstance(body, dict) or not wanted <= set(body) or not body.get("spec", {}).get("image"):
            return 400, {"code": 400, "message": "name, projectId, clusterId and spec.image are required"}
        unknown = set(body["spec"]) - _SPEC_FIELDS
        if unknown or not isinstance(body["spec"].get("args", ""), str):
            return 400, {"code": 400, "message": f"bad request: {sorted(unknown)}"}
        project = next((p for p in self.projects if p["id"] == body["projectId"]), None)
        if project is None or body["clusterId"] != project["clusterId"]:
            return 400, {"code": 400, "message": "no such project on the cluster"}
        same = [w for w in self.live(body["name"]) if w["projectId"] == body["projectId"]]
        if same and self.unique_names:
            return 409, {"code": 409, "message": "a workload with that name already exists"}
        workload = self.add(
            body["name"],
            phase="Creating",
            project=project["name"],
            projectId=project["id"],
            spec=body["spec"],
        )
        return 202, self._training(workload["id"])[1]

    def _delete(self, id_: str) -> tuple[int, Any]:
        workload = self._find(id_)
        if workload is None or workload["deletedAt"] is not None:
            return 404, {"code": 404, "message": "training not found"}
        if self.graceful:
            workload["phase"] = "Deleting"
        else:
            workload |= {"deletedAt": _now(), "runningPods": 0}
        return 202, {"code": 202, "message": "accepted"}

    def _order(self, id_: str, verb: str) -> tuple[int, Any]:
        workload = self._find(id_)
        if workload is None or workload["deletedAt"] is not None:
            return 404, {"code": 404, "message": "training not found"}
        if verb == "suspend":
            workload["phase"] = "Stopping" if self.graceful else "Stopped"
        else:
            workload["phase"] = "Resuming"
        return 202, {"code": 202, "message": "accepted"}

    def new_token(self) -> str:
        """A token in the form of a JWT, good for `token_lifetime_s`."""
        now = int(time.time()) - 7 * 86400  # a server whose clock is a week behind
        claims = {"iat": now, "exp": now + self.token_lifetime_s, "jti": str(uuid.uuid4())}
        parts = [
            base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
            for part in ({"alg": "RS256"}, claims)
        ]
        token = ".".join([*parts, "signature-" + uuid.uuid4().hex])
        self.tokens.add(token)
        self.all_tokens.append(token)
        return token


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that go away are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    control_plane: RunaiStub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer takes 40 ms

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_DELETE = do_GET  # noqa: N815

    def _serve(self) -> None:
        stub = self.control_plane
        path, _, rest = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(rest))
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length) if length else b""
        with stub.lock:
            stub.requests.append((self.command, path, query))
            fault = next((f for f in stub.faults if f.matches(self.command, path)), None)
            if fault is not None:
                fault.times -= 1
            if fault is None or fault.after:
                status, document = self._carried_out(path, query, raw)
        if fault is None:
            self._reply(status, json.dumps(document).encode())
        else:
            self._misbehave(fault)

    def _carried_out(self, path: str, query: dict[str, str], raw: bytes) -> tuple[int, Any]:
        stub = self.control_plane
        body = json.loads(raw) if raw else None
        if path == "/api/v1/token":
            sent = (body.get("grantType"), body.get("clientId"), body.get("clientSecret"))
            if sent != ("client_credentials", CLIENT_ID, CLIENT_SECRET):
                return 401, {"code": 401, "message": f"wrong credentials: {raw.decode()}"}
            return 200, {"accessToken": stub.new_token()}
        authorization = self.headers.get("Authorization", "")
        if authorization.removeprefix("Bearer ") not in stub.tokens:
            return 401, {"code": 401, "message": f"token is not valid: {authorization}"}
        if any(self.command == method and part in path for method, part in stub.refused_methods):
            return 403, {"code": 403, "message": "access rule missing"}
        return stub.answer(self.command, path, query, body)

    def _misbehave(self, fault: Fault) -> None:
        stub = self.control_plane
        if fault.kind == "reset":
            # A linger of no seconds makes the kernel send RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            os.close(self.connection.detach())
        elif fault.kind == "silent":
            self.close_connection = True
            stub.stopping.wait(30)
        elif fault.kind in ("trickle", "huge"):
            self.close_connection = True
            self.send_response(200)
            self.end_headers()
            try:
                while not stub.stopping.wait(0.02 if fault.kind == "trickle" else 0):
                    self.wfile.write(b" " if fault.kind == "trickle" else b" " * 65536)
            except OSError:
                pass
        elif fault.kind == "drip":
            self.close_connection = True
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for _ in range(40):
                    stub.stopping.wait(0.05)
                    self.wfile.write(b"X: 1\r\n")
        elif fault.kind.isdecimal():
            told = {"code": int(fault.kind), "message": f"made to fail; {self.headers.get('Authorization')}"}
            self._reply(int(fault.kind), fault.body or json.dumps(told).encode(), fault.headers)
        else:
            bodies = {
                "html": b"<html><body>Log in</body></html>",
                "not-json": b'{"workloads": [',
                "shape": b'{"workloads": {"a": 1}, "name": 3}',
                "empty": b"",
            }
            self._reply(200, bodies[fault.kind] if fault.body is None else fault.body, fault.headers)

    def _reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
