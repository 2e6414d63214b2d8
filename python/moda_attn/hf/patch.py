"""Patching a Hugging Face model in place, and undoing it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .._checks import compute_dtype
from ..config import ModaConfig
from ..errors import ModaRuntimeError, ModaTypeError, ModaValueError
from ..layer import ModaLayer
from .attention import (
    patch_attention,
    patched_class,
    refuse_foreign_forward,
    refuse_unsupported,
    unpatch_attention,
)
from .legacy import LegacyRuntime, LegacyStructure, legacy_patched
from .names import NAME
from .placement import home_of
from .registry import UNKNOWN, MediaTokens, family_of
from .runtime import Runtime
from .structure import Structure, find_structure
from .wrappers import refuse_removal, unwrapped

if TYPE_CHECKING:
    from .._typing import PatchedAttention

_RUNTIME = "moda_runtime"


@dataclass(frozen=True)
class ApplyReport:
    """What :func:`apply` did.

    Attributes:
        model: name of the model class.
        layers: indices of the layers that got MODA parameters.
        skipped: index of every other layer -> why.
        parameters: number of parameters added.
        attention: the attention implementation that the text decoder now uses.
        already: the model was patched with this configuration before; nothing was done.
    """

    model: str
    layers: tuple[int, ...]
    skipped: dict[int, str]
    parameters: int
    attention: str
    already: bool = False

    def __str__(self) -> str:
        state = "was already patched" if self.already else "patched"
        reasons = "; ".join(f"{index}: {reason}" for index, reason in self.skipped.items())
        skipped = f"{len(self.skipped)} skipped" + (f" ({reasons})" if reasons else "")
        return (
            f"{self.model} {state}: {len(self.layers)} layers, {skipped}, "
            f"{self.parameters:,} parameters added, attention {self.attention!r}"
        )


def apply(model: nn.Module, config: ModaConfig | None = None, *, attention: str | None = None) -> ApplyReport:
    """Patch a Hugging Face model in place.

    Load the pretrained weights first. The patched model takes three more keyword arguments in forward:
    ``modality_ids`` (B, N), needed with ``inputs_embeds``; ``mm_token_type_ids``, the same, where 2 is always video
    (and counts as vision with two modalities); both also in generate; and ``moda_context``
    (B, N) bool, the tokens that may feed a basis. With ``context="prompt"`` a training step must give ``labels`` or
    ``moda_context``; any other call takes all its tokens for the prompt. A call on a cache that holds a prompt uses
    that prompt's bases: a later text turn is aligned with them, later images are refused.

    Args:
        model: any transformers model with one text decoder whose attention has the seam: it rotates its keys, then
            hands them to ``past_key_values.update``. Of the families in :data:`moda_attn.hf.FAMILIES` the modality
            ids are known; any other needs ``modality_ids`` in every prompt.
        config: default ``ModaConfig()``.
        attention: "moda" computes attention with this package's kernel; "keep" keeps the model's own implementation,
            possible where the configuration only aligns keys. Default: "keep" where possible, else "moda".

    Returns:
        What was done. Applying the same configuration again does nothing and says so.

    Raises:
        ModaTypeError, ModaValueError: a model that is not supported or in a state that cannot be patched, or a
            configuration that does not fit it.
    """
    config = ModaConfig() if config is None else config
    if not isinstance(config, ModaConfig):
        raise ModaTypeError(f"config must be a ModaConfig, got {type(config).__name__}")
    runtime = runtime_of(model)
    if runtime is not None:
        if runtime.config != config:
            raise ModaValueError(f"the model is already patched with {runtime.config}; call moda_attn.remove first")
        current = _get_attention(model, runtime.structure)
        if attention is not None and _uses_kernel(config, attention) != (current == NAME):
            raise ModaValueError(f"already patched with attention {current!r}; call moda_attn.remove first")
        return _report(model, runtime, already=True)
    structure = find_structure(model)
    use_kernel = _uses_kernel(config, attention)
    if config.num_modalities < 2:
        raise ModaValueError(f"num_modalities = {config.num_modalities}; {type(model).__name__} has text and vision, 2")
    layers = {index: _new_layer(config, structure, model, index) for index in _chosen(config, structure)}
    return _report(model, _install(model, structure, config, layers, use_kernel=use_kernel))


def _chosen(config: ModaConfig, structure: Structure) -> tuple[int, ...]:
    """The layers to patch; raises where the configuration asks for one that cannot be."""
    chosen = config.layer_indices(len(structure.layers) + len(structure.skipped))
    if config.layers == "all":
        return structure.layers
    for index in chosen:
        if index in structure.skipped:
            raise ModaValueError(f"config.layers has {index}, which cannot be patched: {structure.skipped[index]}")
    return chosen


def remove(model: nn.Module) -> None:
    """Undo :func:`apply`: classes, hooks, attention implementation and parameters are those from before, bit for bit.

    Raises:
        ModaValueError: the model is not patched, or PEFT or FSDP holds the parameters.
    """
    runtime = runtime_of(model)
    if runtime is None:
        raise ModaValueError(f"{type(model).__name__} is not patched; nothing to remove")
    if runtime.config is not None:
        refuse_removal(model, moda_layers(model).values())
    for module in runtime.structure.attentions(model).values():
        unpatch_attention(module)
    for module in runtime.structure.others(model):
        module.config = runtime.structure.decoder_of(model).config
    runtime.disconnect(model)
    _set_attention(model, runtime.structure, runtime.attention)
    delattr(model, _RUNTIME)


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime of a patched model, None for any other."""
    return vars(model).get(_RUNTIME) if isinstance(model, nn.Module) else None


def moda_layers(model: nn.Module) -> dict[int, ModaLayer]:
    """The MODA parameters of a patched model by layer index; nothing for any other model."""
    runtime = runtime_of(model)
    if runtime is None:
        return {}
    attentions = cast("dict[int, PatchedAttention]", runtime.structure.attentions(model))
    return {index: attention.moda for index, attention in attentions.items() if attention.moda is not None}


@contextmanager
def watching(model: nn.Module) -> Iterator[Runtime]:
    """Have the text decoder use our attention function inside the block, whatever state the model is in."""
    model = unwrapped(model)
    runtime = runtime_of(model)
    if runtime is None:
        runtime = _install(model, find_structure(model), None, {}, use_kernel=True)
        try:
            yield runtime
        finally:
            remove(model)
        return
    current = _get_attention(model, runtime.structure)
    _set_attention(model, runtime.structure, NAME)
    try:
        yield runtime
    finally:
        _set_attention(model, runtime.structure, current)


def _uses_kernel(config: ModaConfig, attention: str | None) -> bool:
    if attention not in (None, NAME, "keep"):
        raise ModaValueError(f'attention = {attention!r}; wanted "{NAME}", "keep" or None')
    if attention == "keep" and config.changes_attention:
        raise ModaValueError(
            f'attention = "keep" needs a configuration that only aligns keys; got mask {config.mask!r}, '
            f"combine {config.combine!r}, location_prior {config.location_prior}"
        )
    return attention == NAME or config.changes_attention


def _install(
    model: nn.Module,
    structure: Structure,
    config: ModaConfig | None,
    layers: dict[int, ModaLayer],
    *,
    use_kernel: bool,
) -> Runtime:
    attentions = structure.attentions(model)
    for module in attentions.values():
        refuse_foreign_forward(module)
        if use_kernel:
            refuse_unsupported(module)
    old = _get_attention(model, structure)
    if isinstance(structure, LegacyStructure):
        runtime: Runtime
        runtime, subclass = LegacyRuntime(structure, UNKNOWN, config, MediaTokens(), old), legacy_patched
    else:
        from .interface import register  # what it registers with, transformers 4.37 does not have

        register()
        outer: Any = model.config
        family = family_of(outer)
        tokens = family.media_tokens(outer, 2 if config is None else config.num_modalities)
        runtime, subclass = Runtime(structure, family, config, tokens, old), patched_class
    for module in structure.others(model):
        # They share the decoder's configuration, which may come to name an attention function that is not for them.
        module.config = copy.copy(module.config)
    if use_kernel:
        _set_attention(model, structure, NAME)
    for index, module in attentions.items():
        patch_attention(module, layers.get(index), runtime, subclass)
    runtime.connect(model)
    setattr(model, _RUNTIME, runtime)
    return runtime


@torch.inference_mode(False)  # which would make parameters that can never be trained
def _new_layer(config: ModaConfig, structure: Structure, model: nn.Module, index: int) -> ModaLayer:
    """Fresh parameters for one attention module, on its device; float32, or float64 for a float64 model."""
    attention = structure.attentions(model)[index]
    # Any module with weights tells where and in which precision the attention computes; not all have a k_proj, and of
    # a quantized layer only the norms may have them.
    parts = (*attention.modules(), *structure.stack_of(model)[index].modules())
    projection = cast(nn.Linear, next(part for part in parts if isinstance(getattr(part, "weight", None), Tensor)))
    text = attention.config
    heads = text.num_attention_heads
    return ModaLayer(
        config,
        heads,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(attention, "head_dim", None) or text.hidden_size // heads,
        dtype=compute_dtype(projection.weight.dtype),
        device=home_of(projection),
    )


def _get_attention(model: nn.Module, structure: Structure) -> str:
    config: Any = structure.decoder_of(model).config
    return config._attn_implementation


def _set_attention(model: nn.Module, structure: Structure, name: str) -> None:
    if _get_attention(model, structure) != name:
        structure.set_attention(model, name)
    if _get_attention(model, structure) != name:
        raise ModaRuntimeError(f"{type(model).__name__} did not accept the attention implementation {name!r}")


def _report(model: nn.Module, runtime: Runtime, *, already: bool = False) -> ApplyReport:
    with_moda, structure = moda_layers(model), runtime.structure
    return ApplyReport(
        model=type(model).__name__,
        layers=tuple(with_moda),
        skipped=dict(
            sorted(
                {
                    **{index: "not in config.layers" for index in structure.layers if index not in with_moda},
                    **structure.skipped,
                }.items()
            )
        ),
        parameters=sum(p.numel() for layer in with_moda.values() for p in layer.parameters()),
        attention=_get_attention(model, structure),
        already=already,
    )
