"""An order to stop a run, as ``cancel`` and ``suspend`` give it: sent, and its end awaited."""

from __future__ import annotations

from typing import Literal

from launcher.backends import OrderStands
from launcher.output import note
from launcher.rundir_errors import run_dir_errors
from launcher.site import Site

_GOES_ON = {"cancel": "cancelling", "suspend": "suspending"}


def ordered(site: Site, order: Literal["cancel", "suspend"], run: str, timeout_s: float | None) -> bool:
    """Give the order and wait for its end; False where Ctrl-C came first, and what that means was told.

    Args:
        timeout_s: how long to wait for the end; None: as long as the backend thinks right.

    Raises:
        LauncherError: the backend refuses, or what lies under the name is no run.
    """
    give = {"cancel": site.backend.cancel, "suspend": site.backend.suspend}[order]
    try:
        with run_dir_errors():
            give(run, timeout_s=timeout_s)
    except KeyboardInterrupt as interrupt:
        shown = f"`{site.suggest('status', run)}` shows"
        if site.local or isinstance(interrupt, OrderStands):
            note(f"{_GOES_ON[order]} {run} goes on; {shown} when it is done")
        else:
            note(f"the request to {order} {run} may not have arrived; {shown} whether it did")
        return False
    return True
