"""Moving a patched model away from its start, for every kind of model and every version of transformers."""

from __future__ import annotations

import torch
from torch import nn


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    """Move every MODA parameter away from its start, so that its effect shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moda." in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
