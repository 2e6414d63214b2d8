"""The hooks on a patched model of the original code."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...config import TEXT
from ...errors import ModaRuntimeError, ModaValueError
from ..ids import ModaCall, describe_call
from ..runtime import Runtime
from .cache import cache_class
from .structure import PREPARE, namespace_of
from .tokens import Prepared, prepare


@dataclass
class Running:
    """What one thread does with the model; the servers of these code bases generate in several at once.

    Attributes:
        prepared: the tokens that the model merged last.
        generating: whether the model is inside `generate`.
    """

    prepared: Prepared | None = None
    generating: bool = False


@dataclass
class LegacyRuntime(Runtime):
    """What one patched model shares with its layers."""

    @property
    def running(self) -> Running:
        """Of this thread."""
        if not hasattr(self.own, "running"):
            self.own.running = Running()
        return self.own.running

    @running.setter
    def running(self, running: Running) -> None:
        self.own.running = running

    def connect(self, model: nn.Module) -> None:
        """Stand before the methods that merge, generate and save, and hook the model and its decoder."""
        decoder = self.structure.decoder_of(model)
        self.handles.append(model.register_forward_pre_hook(self.before_model))
        self.handles.append(decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True))
        self.handles.append(decoder.register_forward_hook(self.after_forward, with_kwargs=True))
        # Partials of bound methods: a deep copy of the model gets its own.
        vars(model)[PREPARE] = functools.partial(self.prepare, model)
        vars(model)["generate"] = functools.partial(self.generate, model)
        if self.config is not None and hasattr(model, "save_pretrained"):
            from ..io import save_beside

            vars(model)["save_pretrained"] = functools.partial(save_beside, model)

    def disconnect(self, model: nn.Module) -> None:
        """Undo :meth:`connect`."""
        super().disconnect(model)
        del vars(model)[PREPARE]

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple:
        """The model's own method; remembers which position of its result is what."""
        original = getattr(type(model), PREPARE)
        result, self.running.prepared = prepare(functools.partial(original, model), args, kwargs)
        return result

    def generate(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, in which embeddings that were not merged are text."""
        outer, self.running = self.running, Running(generating=True)
        try:
            return type(model).generate(model, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            self.running = outer

    def before_model(self, module: nn.Module, args: tuple) -> None:
        """Raise in a training step that would leave MODA's parameters behind."""
        if self.config is not None and module.training and torch.is_grad_enabled():
            self._refuse_lost_parameters(module)

    def before_forward(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:  # type: ignore[override]
        """Give the decoder a cache that says what every layer must know about the tokens."""
        arguments = _named(module, args, kwargs)
        cache = arguments.get("past_key_values")
        if cache is None:
            cache = cache_class(namespace_of(module.layers[0].self_attn)["DynamicCache"])()
            cache.storing = _caches(module, arguments.get("use_cache"))
        elif not hasattr(cache, "states"):
            raise ModaRuntimeError(
                f"past_key_values is a {type(cache).__name__} that this patched model did not fill: its bases are "
                "unknown. Give the one that the model returned; of generate's modes that make their own (contrastive "
                "search, assisted decoding) none works, greedy decoding, sampling and beam search do"
            )
        call, merged = self._describe(module, arguments | {"past_key_values": cache})
        cached = cache.states.get(0)
        if cached is not None and merged and self.config is not None and self.config.needs_basis:
            raise ModaValueError(
                f"images in a call on a cache of {cached.modality.shape[1]} tokens: give the whole prompt in one call "
                "with an empty cache"
            )
        cache.call = call
        arguments["past_key_values"] = cache
        if arguments.get("position_ids") is None and self.config is not None:
            arguments["position_ids"] = _positions(call.modality, None if cached is None else cached.modality)
        return (), arguments

    def after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Raise when a layer was passed by: a wrapper that hides the patched class would be a silent no-op."""
        super().after_forward(module, args, {"moda_call": kwargs["past_key_values"].call}, output)

    def _describe(self, decoder: nn.Module, arguments: dict[str, Any]) -> tuple[ModaCall, bool]:
        """What the call's tokens are, and whether images are among them."""
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        tokens = embeds if ids is None else ids
        if not isinstance(tokens, Tensor):
            raise ModaValueError("the decoder was called without input_ids and without inputs_embeds")
        prepared, generating = self.running.prepared, self.running.generating
        if prepared is not None and not prepared.describes(tokens):
            inside = generating and ids is None
            prepared = prepared.expanded(*tokens.shape[:2]) if inside else None
        if prepared is None and ids is None and not generating:
            raise ModaValueError(
                f"inputs_embeds that {PREPARE} of this model did not just return: which tokens are image is unknown. "
                "Call the model with input_ids and images"
            )
        modality, labels = (None, None) if prepared is None else (prepared.modality, prepared.labels)
        if self.recorder is not None:
            self.recorder.labels = labels
        known = {
            "inputs_embeds": tokens,
            "modality_ids": torch.full(tokens.shape[:2], TEXT, device=tokens.device) if modality is None else modality,
            "attention_mask": arguments.get("attention_mask"),
            "past_key_values": arguments["past_key_values"],
            "labels": labels,
        }
        call = describe_call(
            known,
            self.tokens,
            context="all" if self.config is None else self.config.context,
            training=decoder.training and torch.is_grad_enabled(),
            prompt_length=None,
        )
        return call, modality is not None


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a forward call by name."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    by_name = {name: bound.signature.parameters[name] for name in bound.arguments}
    extra = [name for name, parameter in by_name.items() if parameter.kind is parameter.VAR_KEYWORD]
    arguments = {name: value for name, value in bound.arguments.items() if name not in extra}
    return {**arguments, **{name: value for key in extra for name, value in bound.arguments[key].items()}}


def _caches(decoder: Any, use_cache: bool | None) -> bool:
    """Whether the decoder will keep keys; the rule is its own."""
    wanted = decoder.config.use_cache if use_cache is None else use_cache
    return bool(wanted) and not (getattr(decoder, "gradient_checkpointing", False) and decoder.training)


def _positions(modality: Tensor, cached: Tensor | None) -> Tensor:
    """(B, n) positions among the real tokens of a row, where the call brings none of its own.

    Alignment acts on rotated keys: with positions that count padding, a row's result would depend on how far padding
    shifts it.
    """
    before = 0 if cached is None else (cached >= 0).sum(-1, keepdim=True)
    return (before + (modality >= 0).cumsum(-1) - 1).clamp(min=0)
