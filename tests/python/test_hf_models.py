"""Every model family, feature by feature; and the controls without which the features would prove nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

import matrix
import tiny
from moda_attn.hf import seam


@pytest.mark.parametrize("feature", matrix.FEATURES)
@pytest.mark.parametrize("family", tiny.ALL)
def test_model(family: str, feature: str):
    assert matrix.outcome(family, feature) in ("yes", "-")


@pytest.mark.parametrize("family", tiny.ALL)
def test_forgetting_the_basis_would_be_noticed(family: str, monkeypatch: pytest.MonkeyPatch):
    kept = seam.remember

    def forget(cache, layer_idx, state, *args, **kwargs):
        return kept(cache, layer_idx, replace(state, basis=None), *args, **kwargs)

    monkeypatch.setattr(seam, "remember", forget)
    model, x = matrix.patched(family), tiny.inputs(family, matrix.ROWS)
    tokens, steps = matrix.generated(model, x)
    assert matrix.difference(steps, matrix.one_shot(model, x, tokens)) > 20 * matrix.TOLERANCE


@pytest.mark.parametrize("family", tiny.ALL)
def test_attending_to_padding_would_be_noticed(family: str):
    """Without the mask the padding is a token like others, and its embedding is not zero."""
    model, x = matrix.patched(family), tiny.inputs(family, matrix.ROWS)
    real = x["attention_mask"].bool()
    together = matrix.logits(model, x)
    unmasked = matrix.logits(model, x | {"attention_mask": x["attention_mask"].clamp(min=1)})
    assert matrix.difference(unmasked[real], together[real]) > 100 * matrix.TOLERANCE


@pytest.mark.skipif(tiny.RELEASE < (5, 18), reason="the page tells of the newest releases of transformers")
def test_the_table_on_the_page_is_what_the_features_give():
    """`python tests/python/matrix.py` writes it anew."""
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert text == matrix.page_with(text, matrix.table())
