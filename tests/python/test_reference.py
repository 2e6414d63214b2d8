"""The dense reference against formulas written out as loops, finite differences, and its conventions for empty rows."""

from __future__ import annotations

import math

import pytest
import torch

from moda_attn import functional
from moda_attn import reference as ref
from moda_attn.errors import ModaError, ModaTypeError, ModaValueError
from tolerance import assert_close

F64 = torch.float64
MODALITY = torch.tensor([[0, 1, 1, 0, 2, 0], [-1, -1, 0, 1, 0, 0]])


def inputs(
    heads: int = 4, kv_heads: int = 2, dim: int = 3, modality: torch.Tensor = MODALITY
) -> dict[str, torch.Tensor]:
    batch, length = modality.shape
    modalities = 3
    return {
        "query": torch.randn(batch, heads, length, dim, dtype=F64),
        "key": torch.randn(batch, kv_heads, length, dim, dtype=F64),
        "value": torch.randn(batch, kv_heads, length, dim, dtype=F64),
        "keep": torch.randn(modalities, dim, dim, dtype=F64),
        "mix": torch.randn(modalities, dim, dim, dtype=F64),
        "sink": torch.randn(batch, heads, length, dtype=F64),
        "modality_bias": torch.randn(batch, heads, modalities, modalities, dtype=F64),
    }


@pytest.mark.parametrize("kind", ["covariance", "gram"])
@pytest.mark.parametrize("with_context", [False, True])
def test_align_token_by_token(kind: str, with_context: bool):
    x = inputs()
    context = torch.rand(MODALITY.shape) < 0.7 if with_context else None
    aligned, basis = ref.duplex_align(
        x["key"], x["value"], MODALITY, x["keep"], x["mix"], kind=kind, context=context, eps=1e-3
    )
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        key, value, ids = x["key"][b, h], x["value"][b, h], MODALITY[b].tolist()
        unit = [(k + 1e-3) / (k + 1e-3).norm() for k in key]
        bases = torch.zeros(3, 3, 3, dtype=F64)
        for j, m in enumerate(ids):
            if m >= 0 and (context is None or context[b, j]):
                bases[m] += torch.outer(unit[j], value[j] if kind == "covariance" else unit[j])
        assert_close(basis[b, h], bases, name="basis")
        for j, a in enumerate(ids):
            if a < 0:
                assert torch.equal(aligned[b, h, j], key[j])
                continue
            mapping = torch.zeros(3, 3, dtype=F64)
            for m in range(3):
                for row in range(3):
                    size = bases[m, row].norm()
                    if m != a and size > 0:
                        mapping[row] += bases[m, row] / size
            assert_close(aligned[b, h, j], key[j] @ x["keep"][a] + unit[j] @ (mapping @ x["mix"][a]), name="aligned")


@pytest.mark.parametrize("combine", ["joint", "split"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [6, 4])
def test_attention_row_by_row(combine: str, causal: bool, rows: int):
    x = inputs()
    query, ids = x["query"][:, :, -rows:], MODALITY[:, -rows:]
    bias = x["modality_bias"].clone()
    bias[:, :, 0, 1] = -torch.inf
    sink = torch.randn(2, 4, rows, 2, dtype=F64) if combine == "split" else x["sink"][:, :, -rows:]
    out, mass = ref.modular_attention(
        query,
        x["key"],
        x["value"],
        MODALITY,
        is_causal=causal,
        scale=0.3,
        sink=sink,
        modality_bias=bias,
        combine=combine,
        return_mass=True,
    )
    expected, expected_mass = torch.zeros_like(out), torch.zeros_like(mass)
    for b in range(2):
        for h in range(4):
            for i in range(rows):
                mine = int(ids[b, i])
                weights = {}
                for j in range(6):
                    other = int(MODALITY[b, j])
                    if mine < 0 or other < 0 or (causal and j > i + 6 - rows):
                        continue
                    score = 0.3 * query[b, h, i] @ x["key"][b, h // 2, j] + bias[b, h, mine, other]
                    if score > -math.inf:
                        weights[j] = math.exp(score)
                own = {j: w for j, w in weights.items() if MODALITY[b, j] == mine}
                other = {j: w for j, w in weights.items() if MODALITY[b, j] != mine}
                parts = [(weights, 0)] if combine == "joint" else [(own, 0), (other, 1)]
                for part, which in parts:
                    if not part:
                        continue
                    z = math.exp(sink[b, h, i] if combine == "joint" else sink[b, h, i, which])
                    total = sum(part.values()) + z
                    for j, w in part.items():
                        expected[b, h, i] += w / total * x["value"][b, h // 2, j]
                        expected_mass[b, h, i, 0 if j in own else 1] += w / total
                    expected_mass[b, h, i, 2] += z / total
    assert_close(out, expected, name="out")
    assert_close(mass, expected_mass, name="mass")


@pytest.mark.parametrize("decay", [0.7, 0.02, 1e-9, 0.0, -1e-9, -0.02, -0.7, 30.0])
@pytest.mark.parametrize("span", [1, 2, 7, 60])
def test_sink_is_the_log_of_a_sum(decay: float, span: int):
    position = torch.tensor([[0, 1, 5, 58, 59, 3]])
    ids = torch.tensor([[0, 0, 0, 0, 0, -1]])
    rate = torch.full((1, 2), decay, dtype=F64, requires_grad=True)
    base = torch.full((1, 2), -0.5, dtype=F64, requires_grad=True)
    sink = ref.pseudo_sink(position, ids, span, rate, base)
    explicit_rate = rate.detach().clone().requires_grad_()
    rows = []
    for p, m in zip(position[0].tolist(), ids[0].tolist(), strict=True):
        terms = torch.arange(max(span - 1 - p, 0), dtype=F64)
        silent = m < 0 or not len(terms)
        rows.append(
            explicit_rate * 0 - torch.inf if silent else base + torch.logsumexp(-terms * explicit_rate[..., None], -1)
        )
    expected = torch.stack(rows, -1)
    assert_close(sink, expected, name="sink")
    finite = expected.isfinite()
    weight = torch.randn(sink.shape, dtype=F64)
    (sink.masked_fill(~finite, 0) * weight).sum().backward()
    (gradient,) = torch.autograd.grad((expected.masked_fill(~finite, 0) * weight).sum(), explicit_rate)
    assert_close(rate.grad, gradient, name="d decay", gradient=True)
    assert_close(base.grad[0], (finite * weight).sum((0, 2)), name="d base", gradient=True)


def test_sink_of_float32_is_the_rounded_float64():
    position, ids = torch.arange(50)[None], torch.zeros(1, 50, dtype=torch.int32)
    decay, base = torch.rand(1, 3) * 1e-3, torch.randn(1, 3)
    wide = ref.pseudo_sink(position, ids, 4096, decay.double(), base.double())
    assert torch.equal(ref.pseudo_sink(position, ids, 4096, decay, base), wide.float())


@pytest.mark.parametrize("kind", ["covariance", "gram"])
def test_align_gradients_by_finite_differences(kind: str):
    x = inputs()
    leaves = [x[name].requires_grad_() for name in ("key", "value", "keep", "mix")]
    assert torch.autograd.gradcheck(lambda k, v, *t: ref.duplex_align(k, v, MODALITY, *t, kind=kind), leaves)
    basis = torch.randn(2, 2, 3, 3, 3, dtype=F64, requires_grad=True)

    def given(key, basis):
        return ref.duplex_align(key, x["value"], MODALITY, x["keep"], x["mix"], basis=basis)[0]

    assert torch.autograd.gradcheck(given, [leaves[0], basis])


@pytest.mark.parametrize("combine", ["joint", "split"])
def test_attention_gradients_by_finite_differences(combine: str):
    x = inputs()
    if combine == "split":
        x["sink"] = torch.randn(2, 1, 6, 2, dtype=F64)
    leaves = [x[name].requires_grad_() for name in ("query", "key", "value", "sink", "modality_bias")]

    def attend(q, k, v, sink, bias):
        return ref.modular_attention(q, k, v, MODALITY, sink=sink, modality_bias=bias, combine=combine)

    assert torch.autograd.gradcheck(attend, leaves)


def test_rows_that_see_nothing_give_zeros_and_zero_gradients():
    """Padding queries and keys full of NaN, -inf sinks, forbidden pairs and a NaN in a padded value: nothing leaks."""
    x = inputs()
    padded = (MODALITY < 0)[:, None, :, None]
    poisoned = {name: x[name].masked_fill(padded, torch.nan).requires_grad_() for name in ("query", "key", "value")}
    sink = x["sink"].clone()
    sink[:, :, 2:4] = -torch.inf
    sink.requires_grad_()
    bias = torch.full((1, 1, 3, 3), -torch.inf, dtype=F64)
    bias[..., 0, 0] = 0.0  # only text on text is allowed
    bias.requires_grad_()
    keep, mix = x["keep"].requires_grad_(), x["mix"].requires_grad_()
    aligned, basis = ref.duplex_align(poisoned["key"], poisoned["value"], MODALITY, keep, mix)
    out, mass = ref.modular_attention(
        poisoned["query"], aligned, poisoned["value"], MODALITY, sink=sink, modality_bias=bias, return_mass=True
    )
    blind = (MODALITY != 0)[:, None, :, None]
    assert basis.isfinite().all()
    assert out.isfinite().all()
    assert (out.masked_select(blind) == 0).all()
    assert (mass.masked_select(blind) == 0).all()
    out.square().sum().backward()
    for name, leaf in {**poisoned, "sink": sink, "bias": bias, "keep": keep, "mix": mix}.items():
        assert leaf.grad.isfinite().all(), f"gradient of {name}"
    assert (poisoned["query"].grad.masked_select(blind) == 0).all()
    assert (sink.grad.masked_select(blind[..., 0]) == 0).all()
    assert (sink.grad[:, :, 2:4] == 0).all()


def test_a_modality_without_tokens_has_a_zero_basis_and_finite_gradients():
    x = inputs()
    ids = torch.zeros_like(MODALITY)
    key = x["key"].requires_grad_()
    aligned, basis = ref.duplex_align(key, x["value"], ids, x["keep"], x["mix"])
    assert (basis[:, :, 1:] == 0).all()
    assert_close(aligned, key.detach() @ x["keep"][0], name="aligned without another modality")
    aligned.sum().backward()
    assert key.grad.isfinite().all()


def test_identity_fusion_returns_the_keys_bit_for_bit():
    x = inputs(dim=16)
    eye = torch.eye(16).expand(3, 16, 16)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        key = x["key"].to(dtype)
        aligned, basis = ref.duplex_align(key, x["value"].to(dtype), MODALITY, eye, torch.zeros(3, 16, 16))
        assert aligned.dtype == dtype
        assert torch.equal(aligned, key)
        assert basis.dtype == (F64 if dtype == F64 else torch.float32)


def test_given_basis_is_used_and_returned():
    x = inputs()
    aligned, basis = ref.duplex_align(x["key"], x["value"], MODALITY, x["keep"], x["mix"])
    again, returned = ref.duplex_align(
        x["key"][:, :, -2:], x["value"][:, :, -2:], MODALITY[:, -2:], x["keep"], x["mix"], basis=basis
    )
    assert returned is basis
    assert_close(again, aligned[:, :, -2:], name="aligned with a given basis")


def test_joint_masses_sum_to_one_and_extreme_sinks_do_not_overflow():
    x = inputs()
    for level in (-1e30, -1e3, 1e3, 1e30):
        sink = torch.full((1, 1, 6), level, dtype=F64)
        out, mass = ref.modular_attention(x["query"], x["key"], x["value"], MODALITY, sink=sink, return_mass=True)
        real = (MODALITY >= 0)[:, None, :]
        assert out.isfinite().all()
        assert_close(mass.sum(-1), real.expand(mass.shape[:3]).to(F64), name=f"mass at sink {level}")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_query_row_spoils_only_itself(bad: float):
    x = inputs()
    clean = ref.modular_attention(x["query"], x["key"], x["value"], MODALITY)
    x["query"][0, 1, 3, 0] = bad
    out = ref.modular_attention(x["query"], x["key"], x["value"], MODALITY)
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(out, clean)


@pytest.mark.parametrize(("batch", "rows", "columns"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_empty_sizes(batch: int, rows: int, columns: int):
    query, key = torch.randn(batch, 4, rows, 8), torch.randn(batch, 2, columns, 8)
    ids, query_ids = torch.zeros(batch, columns, dtype=torch.int64), torch.zeros(batch, rows, dtype=torch.int64)
    eye = torch.eye(8).expand(2, 8, 8)
    aligned, basis = ref.duplex_align(key, key, ids, eye, eye)
    out = ref.modular_attention(query, aligned, key, ids, query_modality=query_ids)
    assert aligned.shape == key.shape
    assert basis.shape == (batch, 2, 2, 8, 8)
    assert out.shape == query.shape
    assert (out == 0).all()


def attend(**changed):
    x = inputs()
    arguments = {"query": x["query"], "key": x["key"], "value": x["value"], "modality": MODALITY} | changed
    return ref.modular_attention(**arguments)


def align(**changed):
    x = inputs()
    arguments = {name: x[name] for name in ("key", "value", "keep", "mix")} | {"modality": MODALITY} | changed
    return ref.duplex_align(**arguments)


@pytest.mark.parametrize(
    ("call", "changed", "error", "message"),
    [
        (attend, {"query": [1.0]}, ModaTypeError, "query must be a torch.Tensor, got list"),
        (attend, {"modality": None}, ModaTypeError, "modality must be a torch.Tensor, got NoneType"),
        (attend, {"query": torch.randn(2, 3, 6, 3, dtype=F64)}, ModaValueError, "3 heads, key has 2"),
        (attend, {"key": torch.randn(2, 2, 6, 3)}, ModaTypeError, "dtypes must agree"),
        (attend, {"query": torch.ones(2, 4, 6, 3, dtype=torch.int32)}, ModaTypeError, "unsupported dtype"),
        (attend, {"query": torch.randn(1, 2, 4, 6, 3, dtype=F64)}, ModaValueError, "query has shape"),
        (attend, {"value": torch.randn(2, 2, 5, 3, dtype=F64)}, ModaValueError, "value has shape"),
        (attend, {"modality": MODALITY - 1}, ModaValueError, r"modality\[1, 0\] = -2"),
        (attend, {"modality": MODALITY.double()}, ModaTypeError, "modality has dtype"),
        (attend, {"modality_bias": torch.zeros(1, 1, 2, 2, dtype=F64)}, ModaValueError, r"modality\[0, 4\] = 2"),
        (attend, {"sink": torch.zeros(2, 4, 6)}, ModaTypeError, "sink has dtype"),
        (attend, {"sink": torch.zeros(2, 4, 5, dtype=F64)}, ModaValueError, "sink has shape"),
        (attend, {"combine": "sum"}, ModaValueError, "combine = 'sum'"),
        (attend, {"query": torch.randn(2, 4, 7, 3, dtype=F64)}, ModaValueError, "query_modality"),
        (
            align,
            {"keep": torch.zeros(2, 3, 3, dtype=F64), "mix": torch.zeros(2, 3, 3, dtype=F64)},
            ModaValueError,
            "= 2;",
        ),
        (align, {"kind": "cov"}, ModaValueError, "kind = 'cov'"),
        (align, {"context": torch.ones(2, 6)}, ModaTypeError, "context has dtype"),
        (align, {"basis": torch.zeros(2, 2, 2, 3, 3, dtype=F64)}, ModaValueError, "basis has shape"),
        (align, {"basis": torch.zeros(2, 2, 3, 3, 3)}, ModaTypeError, "basis has dtype"),
        (align, {"keep": torch.zeros(3, 3, 3, dtype=torch.float16)}, ModaTypeError, "keep has dtype"),
        (align, {"key": torch.empty(2, 2, 6, 3, dtype=F64, device="meta")}, ModaValueError, "meta"),
    ],
)
def test_bad_input(call, changed, error, message):
    with pytest.raises(error, match=message) as caught:
        call(**changed)
    assert isinstance(caught.value, ModaError)


def test_bad_sink_arguments():
    ids, table = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(2, 3)
    with pytest.raises(ModaValueError, match="span = 0"):
        ref.pseudo_sink(ids, ids, 0, table, table)
    with pytest.raises(ModaTypeError, match="span must be an int"):
        ref.pseudo_sink(ids, ids, 4.0, table, table)
    with pytest.raises(ModaTypeError, match="decay has dtype"):
        ref.pseudo_sink(ids, ids, 4, table.half(), table.half())
    with pytest.raises(ModaValueError, match=r"query_modality\[0, 0\] = 2"):
        ref.pseudo_sink(ids, ids + 2, 4, table, table)


@pytest.mark.parametrize("combine", ["joint", "split"])
def test_an_infinite_sink_takes_all_mass(combine):
    query, key, value = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    modality = torch.tensor([[0, 1, 0, 1, 0]])
    sink = torch.full((1, 1, 5) if combine == "joint" else (1, 1, 5, 2), torch.inf, dtype=torch.float64)
    for function in (ref.modular_attention, functional.modular_attention):
        out, mass = function(query, key, value, modality, sink=sink, combine=combine, return_mass=True)
        gradients = torch.autograd.grad(out.sum(), (query, key, value))
        assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in (out, *gradients))
        assert torch.equal(mass[..., :2], torch.zeros_like(mass[..., :2]))
        assert mass[..., 2].min() >= 1
