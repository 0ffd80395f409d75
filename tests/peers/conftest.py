"""Weights and draws that are the same in every run."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def seeded():
    """Seeds what the peers draw from."""
    import torch  # here, since without torch this file is loaded all the same

    torch.manual_seed(0)
    np.random.seed(0)
