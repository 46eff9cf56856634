"""The products in pure PyTorch, for any device and type: what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from influence.layout import FactorLayout, ShapeClass

RowSlots = Sequence[tuple[int, int]]
"""The first and the end slot of each row, on the host."""


def project(values_TX: Tensor, signs_KX: Tensor, source_W: Tensor, out_KW: Tensor) -> None:
    """See `influence.kernels.project`."""
    with torch.autocast(values_TX.device.type, enabled=False):
        named_WX = values_TX.index_select(0, source_W.clamp(min=0)).to(signs_KX.dtype)
        product_WK = (named_WX @ signs_KX.mT).masked_fill_((source_W < 0).unsqueeze(1), 0.0)
        out_KW.copy_(product_WK.mT)


def response_gradients(factors_FW: Tensor, row_slots: RowSlots, layout: FactorLayout, out_RD: Tensor) -> None:
    """See `influence.kernels.response_gradients`. Adds up in float64."""
    for shape_class in layout.classes:
        G_RCd = shape_class.of(out_RD)
        for row, (first, end) in enumerate(row_slots):
            u_COW, v_CIW = _factors_of(factors_FW[:, first:end], shape_class, layout)
            G_RCd[row] = (u_COW @ v_CIW.mT).mul_(shape_class.scale).flatten(1)


def score(
    chunks: Sequence[Tensor],
    tiles: Tensor,
    weights_nD: Tensor,
    is_finite_nm: Tensor,
    layout: FactorLayout,
    out: Tensor,
) -> None:
    """See `influence.kernels.score`. Adds up in float64."""
    out.zero_()
    starts = [0]
    for factors_FW in chunks:
        starts.append(starts[-1] + factors_FW.shape[1])
    for chunk, first, end, row in _spans(tiles):
        total_W = out.new_zeros(end - first, dtype=torch.float64)
        for shape_class in layout.classes:
            u_COW, v_CIW = _factors_of(chunks[chunk][:, first:end], shape_class, layout)
            M_COI = shape_class.of(weights_nD)[row].double().view(-1, shape_class.k_out, shape_class.k_in)
            s_CW = ((M_COI @ v_CIW) * u_COW).sum(1)
            is_finite_C = is_finite_nm[row, torch.tensor(shape_class.members, device=s_CW.device)]
            total_W += s_CW.masked_fill_(~is_finite_C.unsqueeze(1), 0.0).sum(0)
        out[starts[chunk] + first : starts[chunk] + end] = total_W


def _factors_of(factors_FW: Tensor, shape_class: ShapeClass, layout: FactorLayout) -> tuple[Tensor, Tensor]:
    """u [C, k_out, W] and v [C, k_in, W] of a class's modules, in float64."""
    places = [layout.places[module] for module in shape_class.members]
    u_rows = [row for place in places for row in range(place.u_row, place.u_row + place.k_out)]
    v_rows = [row for place in places for row in range(place.v_row, place.v_row + place.k_in)]
    u, v = (factors_FW[torch.tensor(rows, device=factors_FW.device)].double() for rows in (u_rows, v_rows))
    num_slots = factors_FW.shape[1]
    return u.view(-1, shape_class.k_out, num_slots), v.view(-1, shape_class.k_in, num_slots)


def _spans(tiles: Tensor) -> list[tuple[int, int, int, int]]:
    """(chunk, first slot, end slot, row), neighbouring tiles of a row put together again."""
    spans: list[tuple[int, int, int, int]] = []
    for chunk, first, length, row in tiles.tolist():
        if spans and (spans[-1][0], spans[-1][2], spans[-1][3]) == (chunk, first, row):
            spans[-1] = (chunk, spans[-1][1], first + length, row)
        else:
            spans.append((chunk, first, first + length, row))
    return spans
