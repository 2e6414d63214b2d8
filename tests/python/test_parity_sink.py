"""The pseudo-scores' logits against the float64 reference: spans, decays near and at zero, padding, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moda_attn import functional as F
from moda_attn import reference
from parity import evaluate, poisoned_memory, promote
from problems import IDS, IMAGES, PADDINGS, Case, sink_problem
from test_parity_drawn import LENGTHS, SETTINGS
from tolerance import verdict

#: What the decays are drawn around: off, the series and both sides of the closed form, its start, growth.
DECAYS = (0.0, 1e-9, 1e-4, 2.0**-8, 0.5, 30.0, -1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@SETTINGS
@given(
    length=st.one_of(st.sampled_from(LENGTHS), st.integers(1, 1100)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 4)),
    image=st.sampled_from(IMAGES),
    padding=st.sampled_from(PADDINGS),
    ids=st.sampled_from(IDS),
    reach=st.sampled_from([0.3, 1.0, 1.01, 4.0, 30.0]),
    decay=st.sampled_from(DECAYS),
    base=st.sampled_from([0.0, -4.0]),
    seed=st.integers(0, 99),
)
def test_pseudo_sink(dtype, length, shape, image, padding, ids, reach, decay, base, seed):
    names = dict(zip(("batch", "heads", "modalities"), shape, strict=True))
    case = Case(length=length, **names, image=image, padding=padding, ids=ids, seed=seed)
    arguments = sink_problem(case, dtype, span=max(int(length * reach), 1), decay=decay, base=base)
    with poisoned_memory():
        got, upstream = evaluate(F.pseudo_sink, arguments)
    truth, _ = evaluate(reference.pseudo_sink, promote(arguments), upstream)
    eager, _ = evaluate(reference.pseudo_sink, arguments, upstream)
    for name, tensor in got.items():
        # z is a logit: near 0 its absolute error counts. The rows' gradients may cancel: their terms are the measure.
        terms = (
            max(abs(base), 1.0) * tensor.numel() ** 0.5 if name == "output 0" else term_size(arguments, upstream, name)
        )
        gradient = name != "output 0"
        outcome = verdict(tensor, truth[name], name=name, gradient=gradient, eager=eager[name], scale=terms)
        assert outcome, str(outcome)


def term_size(arguments: dict, upstream: list[torch.Tensor], name: str) -> float:
    """Root of the sum of squares of what every row adds to the gradient of decay or base.

    One row's derivative is the mean of -t under the weights exp(-t decay), 1 for base.
    """
    if name == "d_base":
        return upstream[0].double().norm().item()
    wide = promote(arguments)
    step = 1e-4
    logits = [reference.pseudo_sink(**{**wide, "decay": wide["decay"] + sign * step}) for sign in (1, -1)]
    slope = torch.nan_to_num((logits[0] - logits[1]) / (2 * step))
    return (slope * upstream[0]).norm().item()
