"""ModaAttention against the dense reference, its cache, its parameters, and what it takes over from transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import moda_attn
import tiny
from moda_attn import ModaAttention, ModaCache, ModaConfig, reference
from moda_attn.errors import ModaTypeError, ModaValueError
from moda_attn.mask import alibi_slopes, basis_affinity
from moda_attn.rotary import rotate
from tolerance import assert_close, relative_l2

MODALITY = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [-1, -1, 0, 1, 0, 1, 0, 0]])
CONTEXT = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]]).bool()
CONFIGS = {
    "default": ModaConfig(),
    "paper": ModaConfig.paper(),
    "released": ModaConfig.released(),
    "gram split": ModaConfig(basis="gram", combine="split"),
    "low rank": ModaConfig(fuser_rank=2, mask="fixed"),
    "learned": ModaConfig(mask="learned", fusion="add", align=("text",)),
    "learned split": ModaConfig(mask="learned", fusion="aligned", combine="split", span=6),
    "mlp": ModaConfig(aligner="mlp"),
    "mlp2": ModaConfig(aligner="mlp2", fusion="aligned", location_prior=False),
    "mlp2_gelu": ModaConfig(aligner="mlp2_gelu", fusion="gated"),
    "prior alone": ModaConfig(align=(), mask="none"),
    "three modalities": ModaConfig(num_modalities=3, align=("vision",)),
    "nothing": ModaConfig(fusion="original", mask="none", location_prior=False),
}


def build(config: ModaConfig, dtype: torch.dtype = torch.float64) -> ModaAttention:
    module = ModaAttention(24, 4, 2, 8, config=config, rope_theta=10000.0).to(dtype)
    with torch.no_grad():
        for parameter in module.moda.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def by_the_book(module: ModaAttention, hidden: Tensor, modality: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """The module's output and mass written out with the dense reference, parameter by parameter."""
    config, moda = module.config, module.moda
    position = (modality >= 0).long().cumsum(-1) - 1
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (project(hidden).unflatten(-1, (-1, 8)).transpose(1, 2) for project in projections)
    query, key = rotate(query, key, position.clamp(min=0), 10000.0)
    count = config.num_modalities
    keep, mix = torch.eye(8, dtype=hidden.dtype).repeat(count, 1, 1), torch.zeros(count, 8, 8, dtype=hidden.dtype)
    fuser = moda.aligner.fuser
    eye = torch.eye(8, dtype=hidden.dtype)
    for row, m in enumerate(config.align_ids):
        if config.fusion == "gated":
            keep[m], mix[m] = fuser.weight[row], torch.diag(fuser.gate[row]) @ fuser.weight[row]
        elif config.fuser_rank:
            keep[m], mix[m] = eye + fuser.keep_in[row] @ fuser.keep_out[row], fuser.mix_in[row] @ fuser.mix_out[row]
        elif config.fusion == "concat":
            keep[m], mix[m] = fuser.keep[row], fuser.mix[row]
        else:
            keep[m], mix[m] = eye * (config.fusion == "add"), eye
    aligned, basis = reference.duplex_align(key, value, modality, keep, mix, kind=config.basis, context=context)
    if config.aligner != "basis":
        unit = (key + 1e-6) / (key + 1e-6).norm(dim=-1, keepdim=True)
        aligned = key.clone()
        for row, m in enumerate(config.align_ids):
            mapped = moda.aligner.maps[row](unit)
            chosen = (modality == m)[:, None, :, None]
            aligned = torch.where(chosen, key @ keep[m] + mapped @ mix[m], aligned)
    options: dict = {"combine": config.combine}
    sinks = []
    for which in range(2 if config.combine == "split" else 1):
        if config.mask == "learned":
            remaining = (config.span - 1 - position).clamp(min=0)[:, None].double()
            mask_key = moda.mask.mask_key[which].repeat_interleave(2, dim=0)
            score = 8**-0.5 * (query * mask_key[:, None]).sum(-1)
            sinks.append((remaining.log() + score).masked_fill((modality < 0)[:, None], -torch.inf))
        elif config.mask != "none":
            base = moda.mask.base[which]
            decay = moda.mask.decay[which].abs() if config.mask == "decay" else torch.zeros_like(base)
            sinks.append(reference.pseudo_sink(position, modality, config.span, decay, base))
    if sinks:
        options["sink"] = torch.stack(sinks, -1) if config.combine == "split" else sinks[0]
    if config.location_prior:
        bias = torch.zeros(len(modality), 4, count, count, dtype=hidden.dtype)
        for h in range(4):
            normed = [torch.nan_to_num(g / g.norm(dim=-1, keepdim=True)) for g in basis[:, h // 2].unbind(1)]
            for a in range(count):
                for b in range(count):
                    if a != b:
                        bias[:, h, a, b] = moda.prior.strength[h] * (normed[a] * normed[b]).sum((-1, -2)) / 8
        options["modality_bias"] = bias
    out, mass = reference.modular_attention(query, aligned, value, modality, return_mass=True, **options)
    return module.o_proj(out.transpose(1, 2).flatten(2)), mass


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_against_the_reference(config: ModaConfig):
    module = build(config)
    hidden = torch.randn(2, 8, 24, dtype=torch.float64)
    out, mass = module(hidden, MODALITY, context=CONTEXT, return_mass=True)
    expected, expected_mass = by_the_book(module, hidden, MODALITY, CONTEXT)
    assert_close(out, expected, name="out")
    assert_close(mass, expected_mass, name="mass")
    assert torch.equal(module(hidden, MODALITY, context=CONTEXT), out)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_gets_a_gradient(config: ModaConfig):
    module = build(config, torch.float32)
    hidden = torch.randn(2, 8, 24, requires_grad=True)
    module(hidden, MODALITY, context=CONTEXT).square().sum().backward()
    assert hidden.grad.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} has a gradient of zeros"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("chunks", [(6, 1, 1), (6, 2)])
def test_decoding_with_a_cache(config: ModaConfig, chunks: tuple[int, ...]):
    """A prompt and then the rest equals one call whose context is the prompt."""
    module = build(config)
    hidden = torch.randn(2, 8, 24, dtype=torch.float64)
    context = (torch.arange(8) < 6).expand(2, 8)
    expected, expected_mass = module(hidden, MODALITY, context=context, return_mass=True)
    cache, outs, masses = ModaCache(), [], []
    for piece, ids in zip(hidden.split(chunks, dim=1), MODALITY.split(chunks, dim=1), strict=True):
        out, mass = module(piece, ids, cache=cache, return_mass=True)
        outs.append(out)
        masses.append(mass)
    assert_close(torch.cat(outs, dim=1), expected, name="out")
    assert_close(torch.cat(masses, dim=2), expected_mass, name="mass")
    assert cache.key.shape == (2, 2, 8, 8)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_autocast(config: ModaConfig):
    """Products run in bfloat16; tables, sinks and biases stay float32, and so do their gradients."""
    module = build(config, torch.float32)
    hidden = torch.randn(2, 8, 24)
    context = (torch.arange(8) < 6).expand(2, 8)
    expected = module(hidden, MODALITY, context=context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(hidden, MODALITY, context=context)
        cache = ModaCache()
        parts = [module(hidden[:, piece], MODALITY[:, piece], cache=cache) for piece in (slice(0, 6), slice(6, 8))]
    assert out.dtype == torch.bfloat16
    assert relative_l2(out, expected) < 5e-2
    assert relative_l2(torch.cat(parts, dim=1), expected) < 5e-2
    out.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize("name", ["default", "learned split", "mlp2_gelu"])
def test_it_compiles_without_a_graph_break(name: str):
    module = build(CONFIGS[name])
    hidden = torch.randn(2, 8, 24, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    out = compiled(hidden, MODALITY, context=CONTEXT)
    assert_close(out, module(hidden, MODALITY, context=CONTEXT), name="out")
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_fresh_modules_start_as_plain_attention():
    """Whatever the fusion, a fresh aligner changes nothing; with mask "none" the module is ordinary attention."""
    hidden = torch.randn(2, 8, 24)
    torch.manual_seed(3)
    plain = ModaAttention(24, 4, 2, 8, config=CONFIGS["nothing"], rope_theta=10000.0)
    expected = plain(hidden, MODALITY)
    for config in (ModaConfig(mask="none"), ModaConfig(mask="none", fuser_rank=2), ModaConfig.released()):
        torch.manual_seed(3)
        fresh = ModaAttention(24, 4, 2, 8, config=config, rope_theta=10000.0)
        assert_close(fresh(hidden, MODALITY), expected.double(), name=str(config))


def test_starting_values():
    module = ModaAttention(24, 4, 2, 8, config=ModaConfig(combine="split"))
    mask = module.moda.mask
    assert mask.decay.shape == mask.base.shape == (2, 2, 4)
    assert torch.equal(mask.decay[1, 1], alibi_slopes(4))
    assert alibi_slopes(8).tolist() == [2.0 ** -(h + 1) for h in range(8)]
    assert (mask.base == -4).all()
    assert (ModaAttention(24, 4, config=ModaConfig(decay=0.5)).moda.mask.decay == 0.5).all()
    assert (ModaAttention(24, 4, config=ModaConfig.paper()).moda.mask.base == 0).all()


def test_a_decay_counts_by_its_magnitude():
    """A step past zero must not let the pseudo-scores of a long span take all mass, which would leave no gradient."""
    module = ModaAttention(24, 4, config=ModaConfig())
    hidden, modality = torch.randn(1, 6, 24), torch.tensor([[0, 1, 1, 0, 0, 1]])
    with torch.no_grad():
        module.moda.mask.decay.fill_(0.01)
        out = module(hidden, modality)
        module.moda.mask.decay.fill_(-0.01)
    crossed = module(hidden, modality)
    assert torch.equal(crossed, out)
    crossed.square().sum().backward()
    assert module.moda.mask.decay.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (ModaConfig(), {"aligner.fuser.keep", "aligner.fuser.mix", "mask.base", "mask.decay", "prior.strength"}),
        (ModaConfig.released(), {"aligner.fuser.weight", "aligner.fuser.gate"}),
        (ModaConfig(fusion="add", mask="fixed", location_prior=False), {"mask.base"}),
        (ModaConfig(align=(), mask="learned", location_prior=False), {"mask.mask_key"}),
        (CONFIGS["nothing"], set()),
    ],
)
def test_only_parameters_that_can_be_used_exist(config: ModaConfig, names: set[str]):
    module = ModaAttention(24, 4, 2, 8, config=config)
    assert {name for name, _ in module.moda.named_parameters()} == names


def test_basis_affinity():
    basis = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64)
    basis[:, :, 2] = 0
    affinity = basis_affinity(basis)
    g = basis / basis.norm(dim=-1, keepdim=True)
    assert affinity[0, 1, 0, 1].item() == pytest.approx((g[0, 1, 0] * g[0, 1, 1]).sum().item() / 4)
    assert (affinity[:, :, 2] == 0).all()
    assert (affinity.diagonal(dim1=-2, dim2=-1) == 0).all()


@pytest.mark.parametrize("patched", [False, True])
def test_taking_over_a_hugging_face_attention(patched: bool):
    model = tiny.build()
    config = ModaConfig(context="all")
    x = tiny.inputs("llava-llama", "TTITTT")
    attention = model.model.language_model.layers[0].self_attn
    seen: dict[str, Tensor] = {}

    def listen(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        seen["hidden"], seen["out"] = kwargs["hidden_states"], output[0]

    attention.register_forward_hook(listen, with_kwargs=True)
    if patched:
        moda_attn.apply(model, config)
        tiny.randomise(model)
    with torch.no_grad():
        model(**x)
        plain = replace(config, fusion="original", mask="none", location_prior=False)
        taken = ModaAttention.from_module(attention) if patched else ModaAttention.from_module(attention, plain)
        modality = (x["input_ids"] == tiny.IMAGE).long()
        assert (taken(seen["hidden"], modality) - seen["out"]).abs().max() < 1e-4
    assert taken.q_proj is attention.q_proj
    if patched:
        assert taken.moda is attention.moda
        with pytest.raises(ModaValueError, match="patched already"):
            ModaAttention.from_module(attention, config)


def test_what_cannot_be_taken_over():
    with pytest.raises(ModaTypeError, match="Linear has parts"):
        ModaAttention.from_module(nn.Linear(2, 2))
    model = tiny.build()
    attention = model.model.language_model.layers[0].self_attn
    attention.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4}
    with pytest.raises(ModaValueError, match="yarn"):
        ModaAttention.from_module(attention)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((24, 4, 3), "multiple of num_kv_heads"),
        ((25, 4), "give head_dim"),
        ((0, 4), "positive sizes"),
        ((24, 4, 2, 0), "head_dim 0"),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[int, ...], message: str):
    with pytest.raises(ModaValueError, match=message):
        ModaAttention(*sizes)


def test_bad_input():
    module = ModaAttention(24, 4, config=ModaConfig())
    hidden = torch.randn(2, 8, 24)
    with pytest.raises(ModaTypeError, match="hidden_states must be a"):
        module([1.0], MODALITY)
    with pytest.raises(ModaValueError, match="hidden_states has shape"):
        module(hidden[..., :5], MODALITY)
    with pytest.raises(ModaValueError, match="modality has shape"):
        module(hidden, MODALITY[:, 1:])
    with pytest.raises(ModaValueError, match="modality"):
        module(hidden, MODALITY + 1)
    with pytest.raises(ModaValueError, match="position_ids has shape"):
        ModaAttention(24, 4, rope_theta=1e4)(hidden, MODALITY, position_ids=torch.zeros(2, 3))
    cache = ModaCache()
    module(hidden, MODALITY, cache=cache)
    with pytest.raises(
        ModaValueError, match=r"cache.key, of earlier calls, has shape \(2, 4, 8, 6\); .* = \(1, 4, N, 6\)"
    ):
        module(hidden[:1, :1], MODALITY[:1, :1], cache=cache)
    with pytest.raises(ModaTypeError, match=r"cache must be a moda_attn.ModaCache, got dict"):
        module(hidden, MODALITY, cache={})


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_few_or_no_tokens(shape: tuple[int, int]):
    module, modality = ModaAttention(24, 4, 2, rope_theta=1e4), torch.zeros(shape, dtype=torch.long)
    hidden = torch.randn(*shape, 24, requires_grad=True)
    out, mass = module(hidden, modality, return_mass=True)
    assert (out.shape, mass.shape) == ((*shape, 24), (shape[0], 4, shape[1], 3))
    out.sum().backward()
    assert hidden.grad.shape == hidden.shape
