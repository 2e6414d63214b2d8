"""The operators inside torch.func's transforms; forward mode and second derivatives, which they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from moda_attn import ModaAttention, ModaConfig, reference
from moda_attn import functional as F
from moda_attn.errors import ModaRuntimeError
from tolerance import assert_close

MODALITY = torch.tensor([[-1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, -1], [0, 0, 0, 0, 1, 0]])
#: torch has no rule for batches of these operators and computes row by row, which it says.
SLOW = pytest.mark.filterwarnings("ignore:There is a performance drop")

QUERY, KEY, VALUE = torch.randn(3, 3, 2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
KEEP, MIX = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
DECAY, BASE = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
POSITION = torch.arange(6).repeat(3, 1)

#: Of every operator a function of one tensor, in terms of a module that has the operators.
OPERATORS: dict[str, tuple[Tensor, Callable]] = {
    "duplex_align": (KEY, lambda ops, key: ops.duplex_align(key, VALUE, MODALITY, KEEP, MIX)[0]),
    "its basis": (VALUE, lambda ops, value: ops.duplex_align(KEY, value, MODALITY, KEEP, MIX)[1]),
    "pseudo_sink": (DECAY, lambda ops, decay: ops.pseudo_sink(POSITION, MODALITY, 32, decay, BASE)[1:, :, 1:5]),
    "modular_attention": (KEY, lambda ops, key: ops.modular_attention(QUERY, key, VALUE, MODALITY)),
    "split": (QUERY, lambda ops, query: ops.modular_attention(query, KEY, VALUE, MODALITY, combine="split")),
}
EVERY = pytest.mark.parametrize("name", OPERATORS)


@EVERY
@SLOW
def test_jacobians(name: str):
    tensor, function = OPERATORS[name]
    found, expected = (torch.func.jacrev(function, argnums=1)(ops, tensor) for ops in (F, reference))
    assert_close(found, expected, name=name)


@pytest.mark.parametrize("config", [ModaConfig(), ModaConfig(combine="split", fuser_rank=2, mask="learned")], ids=str)
@SLOW
def test_gradients_of_every_sample(config: ModaConfig):
    module = ModaAttention(16, 4, 2, config=config, rope_theta=1e4).double()
    hidden = torch.randn(3, 6, 16, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], hidden: Tensor, modality: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (hidden[None], modality[None])).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, hidden, MODALITY)
    for row in range(3):
        expected = torch.autograd.grad(loss(parameters, hidden[row], MODALITY[row]), list(parameters.values()))
        for (name, gradients), gradient in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(gradients[row], gradient, msg=name)


@EVERY
def test_forward_mode_is_refused(name: str):
    tensor, function = OPERATORS[name]
    with pytest.raises(ModaRuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: function(F, x), (tensor,), (tensor,))
    with forward_ad.dual_level():
        with pytest.raises(ModaRuntimeError, match="no forward-mode derivative"):
            function(F, forward_ad.make_dual(tensor, tensor))
        assert_close(function(F, tensor), function(reference, tensor), name=name)
    # What the message advises.
    assert torch.func.jvp(lambda x: function(reference, x), (tensor,), (tensor,))[1].abs().max() > 0


@EVERY
def test_second_derivatives_are_refused(name: str):
    tensor, function = OPERATORS[name]
    slope = torch.func.grad(lambda x: function(F, x).square().sum())
    with pytest.raises(ModaRuntimeError, match="first derivatives only"):
        torch.func.grad(lambda x: slope(x).sum())(tensor)
