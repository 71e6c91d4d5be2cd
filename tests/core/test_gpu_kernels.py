"""The cases of the Triton kernels on a real device, compiled rather than interpreted."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
