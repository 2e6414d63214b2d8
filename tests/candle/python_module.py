"""Writes python_module.safetensors: weights, input and output of the Python module, which candle's must repeat."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from moda_attn import ModaAttention, ModaConfig

torch.manual_seed(0)
config = ModaConfig(num_modalities=3, align=(0, 1, 2), span=32, base=-1.0)
module = ModaAttention(16, 4, 2, config=config, rope_theta=1e4).double()
with torch.no_grad():
    for parameter in module.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    modality = torch.tensor([[0, 0, 1, 1, 1, 2, 0, 1, 0], [-1, -1, 0, 1, 1, 0, 0, 2, 1]])
    context = torch.arange(9)[None] < torch.tensor([[6], [7]])
    hidden = torch.randn(2, 9, 16, dtype=torch.float64)
    out, mass = module(hidden, modality, context=context, return_mass=True)
tensors = {f"weights.{name}": value.contiguous() for name, value in module.state_dict().items()}
tensors |= {"modality": modality, "context": context.long(), "hidden": hidden, "out": out, "mass": mass}
save_file(tensors, Path(__file__).with_suffix(".safetensors"))
