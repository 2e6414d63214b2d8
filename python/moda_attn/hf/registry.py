"""The supported model families, one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from ..errors import ModaTypeError, ModaValueError

if TYPE_CHECKING:
    from .._typing import TextAttention, VisionLanguageModel


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps what the patch needs.

    Attributes:
        model: name of the model class.
        core: path from the model to the module that merges image and text embeddings.
        decoder: path from the model to the text decoder, which has `layers`, each with a `self_attn`.
        text_config: name of the text decoder's part of the configuration.
        image_token: name of the image token's id in the configuration.
        attention: names of the attention classes that the seam was verified on.
    """

    model: str
    core: str = "model"
    decoder: str = "model.language_model"
    text_config: str = "text_config"
    image_token: str = "image_token_id"
    attention: tuple[str, ...] = ("LlamaAttention", "MistralAttention")

    def attentions(self, model: nn.Module) -> list[TextAttention]:
        """The text decoder's attention modules in layer order.

        Raises:
            ModaValueError: the decoder has no layers, or its attention is of a class that is not supported.
        """
        decoder = model.get_submodule(self.decoder)
        attentions = [cast("TextAttention", layer.self_attn) for layer in getattr(decoder, "layers", ())]
        if not attentions:
            raise ModaValueError(f"{self.model}: {self.decoder} has no layer with self_attn; nothing to patch")
        for attention in attentions:
            names = {cls.__name__ for cls in type(attention).__mro__}
            if not names & set(self.attention):
                wanted = " or ".join(self.attention)
                raise ModaValueError(f"{self.model} with text attention {type(attention).__name__}; wanted {wanted}")
        return attentions

    def set_attention(self, model: nn.Module, name: str) -> None:
        """Have the text decoder, and it alone, use the attention implementation `name`."""
        cast("VisionLanguageModel", model).set_attn_implementation({self.text_config: name})


FAMILIES = {
    family.model: family
    for family in (
        Family("LlavaForConditionalGeneration"),
        Family("LlavaNextForConditionalGeneration"),
    )
}


def family_of(model: object) -> Family:
    """The row of `model`.

    Raises:
        ModaTypeError: not a module.
        ModaValueError: a model of no supported family.
    """
    if not isinstance(model, nn.Module):
        raise ModaTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    from .legacy.family import legacy_family  # whose class derives from ours

    if hasattr(model, "peft_config"):
        raise ModaValueError(
            "the model is wrapped by PEFT, which would not save MODA weights: apply first, then wrap it with "
            'modules_to_save=["moda"]'
        )
    legacy = legacy_family(model)
    if legacy is not None:
        return legacy
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ModaValueError(f"{type(model).__name__} is not supported; supported are {', '.join(sorted(FAMILIES))}")
