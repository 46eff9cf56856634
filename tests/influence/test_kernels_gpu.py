"""The Triton kernels against the reference in float64; on a machine without a GPU through Triton's interpreter."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton decides at import, for its own library too.
    if "triton.language" in sys.modules and "influence.kernels.gpu.score" not in sys.modules:
        print("triton was imported before")
    os.environ["TRITON_INTERPRET"] = "1"

from influence import kernels
from influence.kernels import gpu, plain

from influence.kernels.gpu import damped_inverse, project, response_gradients, score
from influence.layout import FactorLayout

print(damped_inverse)
