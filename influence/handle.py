"""What ``with tracer.capture(row_ids) as micro_batch`` gives: second thoughts about a capture that runs."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from influence.recording import CaptureError, Recording
from influence.roots import first_edges

GradientScale = Mapping[int, float] | Sequence[float] | Tensor
"""A number for each row: by row id, or one a row by increasing row id."""


class MicroBatchCapture:
    """A micro-batch while it is captured; of use inside its ``capture()`` alone, CaptureError afterwards."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    @property
    def row_ids(self) -> tuple[int, ...]:
        """The R captured rows, increasing."""
        return self._recording.selection.row_ids

    @property
    def gradient_scale(self) -> Tensor | None:
        """float64 [R], or None: what a row's captured gradients are multiplied by.

        For an objective whose gradient is that of the loss which runs anyway, times a number for each row.
        Can be set until the block ends, as a `GradientScale`.

        Raises ValueError where a row has no number or one that is not finite.
        """
        return self._recording.gradient_scale

    @gradient_scale.setter
    def gradient_scale(self, scale: GradientScale | None) -> None:
        self._check_open()
        self._recording.gradient_scale = None if scale is None else _by_row(scale, self.row_ids)

    @property
    def roots(self) -> list[GradientEdge]:
        """By what to differentiate the objective, so that all traced outputs get a gradient and no weight.

        To be passed to `torch.autograd.grad` as inputs, after the forward: see `backward`.
        """
        self._check_open()
        if not self._recording.edges:
            raise CaptureError(
                "the traced layers have no graph before the backward: run the forward inside capture(), and "
                "use_reentrant=False where it is checkpointed"
            )
        return first_edges(self._recording.edges)

    def backward(self, objective: Tensor, retain_graph: bool = False) -> None:
        """Capture the gradients of `objective`; compute none of a weight, and leave every ``.grad`` alone.

        What other backward passes send through the same layers is not recorded from then on, so that with
        ``retain_graph=True`` a training loss can share the forward: run its backward afterwards.

        Raises CaptureError before a forward, and with reentrant checkpointing, which cannot do this.
        """
        roots, recording = self.roots, self._recording
        recording.is_sealed = recording.is_discarded
        try:
            torch.autograd.grad(objective, roots, retain_graph=retain_graph, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise CaptureError(
                    "backward() of a micro-batch cannot pass reentrant checkpoints; use use_reentrant=False"
                ) from error
            raise
        finally:
            recording.is_sealed = True

    def discard(self) -> None:
        """Drop what was recorded and record nothing more; the rows can be captured again afterwards."""
        self._check_open()
        self._recording.discard()

    def _check_open(self) -> None:
        if not self._recording.is_open:
            raise CaptureError("this micro-batch is captured; set and use it inside its capture()")


def _by_row(scale: GradientScale, row_ids: tuple[int, ...]) -> Tensor:
    if isinstance(scale, Mapping):
        absent = [row_id for row_id in row_ids if row_id not in scale]
        if absent:
            raise ValueError(f"gradient_scale has no number for row {absent[0]}")
        scale = [scale[row_id] for row_id in row_ids]
    try:
        scale_R = torch.as_tensor(scale, dtype=torch.float64).detach().to("cpu", copy=True)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"gradient_scale must be a number for each row, not {reprlib.repr(scale)}"
        ) from error
    if scale_R.shape != (len(row_ids),):
        raise ValueError(
            f"gradient_scale has shape {tuple(scale_R.shape)} where {len(row_ids)} rows are captured; "
            "give one number a row"
        )
    bad = (~scale_R.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"gradient_scale of row {row_ids[bad[0]]} is {float(scale_R[bad[0]])}")
    return scale_R
