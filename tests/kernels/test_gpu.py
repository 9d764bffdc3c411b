"""kernel_checks.py and the other checks on a CUDA device: the same tests, compiled."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    from expert_checks import *  # noqa: F403
    from kernel_checks import *  # noqa: F403
    from quantizer_checks import *  # noqa: F403
    from rounding_checks import *  # noqa: F403
    from self_check_checks import *  # noqa: F403
    from vocabulary_checks import *  # noqa: F403
else:

    def test_kernels_on_a_cuda_device() -> None:
        pytest.fail("the gpu tests need a CUDA device, and none was found")
