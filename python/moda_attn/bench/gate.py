"""The parity gate: no time is taken of what does not compute the right numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..errors import ModaRuntimeError
from . import decoding, peers
from .cases import Race

#: dtype -> largest relative L2 error against a dense float64 evaluation: (output, gradients).
TOLERANCES = {"float64": (1e-12, 1e-11), "float32": (2e-6, 1e-5), "bfloat16": (1e-2, 2e-2), "float16": (2e-3, 4e-3)}
#: Of a forward without gradients the last rows are compared: those that see the most keys.
ROWS = 128


def gate(race: Race, device: str = "cpu") -> dict[str, float]:
    """Relative L2 errors of a race in its dtype, length, head dimension and grouping, at one key head; raises where
    one exceeds its tolerance."""
    _, query_heads, key_heads, tokens, dim = race.shape
    shape = (1, query_heads // key_heads, 1, tokens, dim)
    dtype = getattr(torch, race.dtype)
    if race.decode:
        step = decoding.make_step(shape, dtype, device=device)
        with torch.no_grad():
            errors = {"output": _error(decoding.moda_attn(step), decoding.dense(step.to(torch.float64)))}
    elif race.backward:
        errors = _gradients(peers.make_inputs(shape, dtype, backward=True, device=device))
    else:
        errors = _last_rows(peers.make_inputs(shape, dtype, backward=False, device=device))
    for name, error in errors.items():
        allowed = TOLERANCES[race.dtype][name != "output"]
        if not error <= allowed:
            wanted = f"at most {allowed:g} from the dense float64 evaluation; this build computes wrong numbers"
            raise ModaRuntimeError(f"{race.name}: relative error of {name} is {error:.2e}, wanted {wanted}")
    return errors


def _last_rows(x: peers.Inputs) -> dict[str, float]:
    exact = x.to(torch.float64)
    rows = slice(-min(ROWS, x.query.shape[2]), None)
    with torch.no_grad():
        got = peers.moda_attn(x)[:, :, rows]
        aligned, _ = reference.duplex_align(exact.key, exact.value, exact.modality, exact.keep, exact.mix)
        truth = reference.modular_attention(
            exact.query[:, :, rows],
            aligned,
            exact.value,
            exact.modality,
            sink=exact.sink[:, :, rows],
            modality_bias=exact.bias,
        )
    return {"output": _error(got, truth)}


def _gradients(x: peers.Inputs) -> dict[str, float]:
    names = ("output", *x.named_leaves)

    def results(function: peers.Peer, inputs: peers.Inputs) -> list[Tensor]:
        out = function(inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.upstream)]

    ours, truth = results(peers.moda_attn, x), results(peers.dense, x.to(torch.float64))
    return {name: _error(got, wanted) for name, got, wanted in zip(names, ours, truth, strict=True)}


def _error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())
