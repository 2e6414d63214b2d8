"""Every kernel once on small shapes: what runs under the sanitizer."""

from __future__ import annotations

import torch

from moda_attn import functional
from parity import evaluate
from problems import STAPLES, align_problem, attention_problem


def small(device: str) -> None:
    """Forward and backward of attention and alignment in two dtypes, with all options in use."""
    for dtype in (torch.float32, torch.bfloat16):
        for case in STAPLES[:2]:
            evaluate(functional.modular_attention, attention_problem(case, dtype), device=device, return_mass=True)
            evaluate(functional.duplex_align, align_problem(case, dtype), device=device)
    ids = torch.zeros(2, 9, dtype=torch.long, device=device)
    decay = torch.rand(2, 4, device=device, requires_grad=True)
    logits = functional.pseudo_sink(ids, ids, 99, decay, decay)
    logits.sum().backward()


if __name__ == "__main__":
    small("cuda" if torch.cuda.is_available() else "cpu")
