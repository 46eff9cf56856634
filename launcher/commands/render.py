"""``launcher render``: what ``submit`` would send to a backend, sent nowhere."""

from __future__ import annotations

from typing import Any

import click

from launcher.commands.options import output_option
from launcher.commands.preset_options import RunRequest, run_options
from launcher.output import emit, note


@click.command(epilog="Exit codes: 0 done, 2 usage or unknown preset, 3 invalid preset or template.")
@run_options
@click.option(
    "--backend", type=click.Choice(["kubernetes", "local"]), default="kubernetes", show_default=True,
    help="kubernetes: the Job's manifest; local: the run.json that the trainer reads.",
)  # fmt: skip
@output_option
def command(request: RunRequest, backend: str, output_format: str) -> None:
    """Print what submit would send to a backend.

    Nothing is written or sent. The manifest goes to a cluster with
    `launcher render --preset NAME | kubectl apply -f -`.
    """
    run = request.resolve()
    manifest: dict[str, Any]
    if backend == "kubernetes":
        from launcher.kubernetes_values import TEMPLATE, job_values, unmet_needs
        from launcher.render import parse_manifest, render_template

        text = render_template(TEMPLATE, job_values(run))
        manifest = parse_manifest(text, TEMPLATE)
        for line in unmet_needs(run):
            note(f"note: {line}")
    else:
        import json

        manifest = run.to_dict()
        text = json.dumps(manifest, indent=1, sort_keys=True)
    document = {"backend": backend, "run": run.run, "spec_hash": run.spec_hash, "manifest": manifest}
    emit(output_format, document, lambda: text.rstrip("\n").split("\n"))
