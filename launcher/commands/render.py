"""``launcher render``: what ``submit`` would send to a backend, sent nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.backends import BACKENDS, import_for
from launcher.commands.options import Place, cluster_option, config_option, output_option
from launcher.commands.preset_options import RunRequest, run_options
from launcher.lifecycle import require_nodes
from launcher.output import emit, note
from launcher.profiles import LOCAL
from launcher.working_tree import require_published

if TYPE_CHECKING:
    from influence.rundir.spec import RunSpec

# backend -> (the module that has the template's name as TEMPLATE, its function of the template's values)
_VALUES = {
    "kubernetes": ("launcher.kubernetes_values", "job_values"),
    "kuberay": ("launcher.kuberay_values", "rayjob_values"),
    "runai": ("launcher.runai_values", "training_values"),
}


@click.command(
    epilog="Exit codes: 0 done, 2 usage or unknown preset, 3 invalid preset or template, 5 backend."
)
@run_options
@click.option(
    "--backend", type=click.Choice(list(BACKENDS)),
    help="What to render; by default what the cluster is, for this machine kubernetes. "
    "local: the run.json that the trainer reads.",
)  # fmt: skip
@click.option(
    "--allow-dirty", is_flag=True,
    help="As submit --allow-dirty: store the patch of code that is not committed and pushed.",
)  # fmt: skip
@cluster_option
@config_option
@output_option
def command(
    request: RunRequest,
    backend: str | None,
    allow_dirty: bool,
    cluster: str | None,
    config: Path | None,
    output_format: str,
) -> None:
    """Print what submit would send to a backend.

    Nothing is written or sent, and no server is asked. The manifest goes to a cluster with
    `launcher render --preset NAME | kubectl apply -f -`.
    """
    place = Place(cluster=cluster, config=config)
    profile = place.profile(backend, offline=True)
    if backend is None and cluster is None and profile.backend == LOCAL:
        profile = place.profile("kubernetes", offline=True)
    run = request.resolve(profile)
    if cluster is not None:
        require_nodes(profile, run)
    if allow_dirty and profile.backend != LOCAL:
        run = require_published(run, allow_dirty=True)
    text, manifest = _rendered(profile.backend, run)
    document = {
        "backend": profile.backend, "run": run.run, "spec_hash": run.spec_hash, "manifest": manifest,
    }  # fmt: skip
    emit(output_format, document, lambda: text.rstrip("\n").split("\n"))


def _rendered(backend: str, run: RunSpec) -> tuple[str, dict[str, Any]]:
    """As text, and as data."""
    if backend == LOCAL:
        return json.dumps(run.to_dict(), indent=1, sort_keys=True), run.to_dict()
    from launcher.kubernetes_values import unmet_needs
    from launcher.render import parse_manifest, render_template

    module, values = _VALUES[backend]
    owner = import_for(backend, module)
    text = render_template(owner.TEMPLATE, getattr(owner, values)(run))
    for line in unmet_needs(run):
        note(f"note: {line}")
    return text, parse_manifest(text, owner.TEMPLATE)
