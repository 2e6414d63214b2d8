"""The one rule by which every test compares numbers.

The error of a result is its relative L2 distance to a dense float64 evaluation. It must stay below a bound fixed for
each dtype and, where torch's own dense eager computation in that dtype is at hand, below twice torch's error.

A result that is a difference of large terms may be nothing but rounding (the query gradient of a row that sees one key
is zero). Such an error is measured against the size of the terms, which the caller computes and names `scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: dtype -> (bound on outputs, bound on gradients), relative L2.
BOUNDS = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (2e-3, 4e-3),
}
#: How much worse than torch's dense eager computation in the same dtype a result may be.
EAGER_FACTOR = 2.0


def relative_l2(got: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    """``||got - truth|| / max(||truth||, scale)`` in float64; infinity where only one of them is NaN or infinite."""
    got, truth = got.detach().double(), truth.detach().double()
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, wanted {tuple(truth.shape)}"
    odd = ~truth.isfinite()
    if not torch.equal(torch.nan_to_num(got[odd], nan=12345.0), torch.nan_to_num(truth[odd], nan=12345.0)):
        return float("inf")
    difference = torch.where(odd, 0, got - truth)
    if not difference.isfinite().all():
        return float("inf")
    error, size = difference.norm().item(), max(torch.where(odd, 0, truth).norm().item(), scale)
    return error / size if size else error


@dataclass(frozen=True)
class Verdict:
    """Outcome of one comparison; true when it passed, and its text says by how much."""

    name: str
    error: float
    bound: float

    def __bool__(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.name}: relative L2 error {self.error:.3g}, allowed {self.bound:.3g}"


def verdict(
    got: Tensor,
    truth: Tensor,
    *,
    name: str,
    gradient: bool = False,
    eager: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: float = 0.0,
) -> Verdict:
    """Compare `got` with its float64 `truth` under the bounds of `dtype`, by default got's own.

    `eager` is torch's dense computation in the same dtype. With it the error must also be no more than `EAGER_FACTOR`
    times the eager error; one rounding of the dtype is granted, as eager may happen to be exact. A float32 table beside
    half-precision tensors is only as good as they are: there `dtype` is theirs. `scale` is the size of the terms of a
    result that may cancel.
    """
    dtype = got.dtype if dtype is None else dtype
    bound = BOUNDS[dtype][gradient]
    if eager is not None and dtype != torch.float64:
        allowance = max(relative_l2(eager, truth, scale), torch.finfo(dtype).eps / 2)
        bound = min(bound, EAGER_FACTOR * allowance)
    return Verdict(name, relative_l2(got, truth, scale), bound)


def pooled_verdict(errors: list[float], eager_errors: list[float], dtype: torch.dtype, *, name: str) -> Verdict:
    """The factor to eager held over many problems at once: root mean squares of relative errors are compared.

    On one small problem eager's float32 error is a matter of luck, from nothing at all to several roundings.
    """
    own, eager = (sum(error**2 for error in e) ** 0.5 / max(len(e), 1) ** 0.5 for e in (errors, eager_errors))
    return Verdict(name, own, EAGER_FACTOR * max(eager, torch.finfo(dtype).eps / 2))


def assert_close(got: Tensor, truth: Tensor, *, name: str, gradient: bool = False, eager: Tensor | None = None) -> None:
    """Assert :func:`verdict`."""
    outcome = verdict(got, truth, name=name, gradient=gradient, eager=eager)
    assert outcome, str(outcome)
