"""What marks a test that runs where there is a GPU: ``pytest -m gpu``."""

from __future__ import annotations

import os

import pytest
import torch
from simulated_cuda.building import ENVIRONMENT

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIMULATED = ENVIRONMENT in os.environ
