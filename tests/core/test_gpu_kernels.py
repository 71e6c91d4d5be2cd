"""The Triton kernel cases, compiled on a real device."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
