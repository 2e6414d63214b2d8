"""Stand-ins with the signatures of the original LLaVA and Cambrian-1 code.

They run on transformers' own Llama where that is version 4.37, and on the one in `llama437` elsewhere.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import llama437

OLD = transformers.__version__.startswith("4.37.")
LLAMA: Any = importlib.import_module("transformers.models.llama.modeling_llama") if OLD else llama437

#: A placeholder in the ids, and a label that is not supervised.
IMAGE, IGNORED = -200, -100


class Tower(nn.Module):
    """Patches of an image (n, 3, 8, 8) -> (n, side * side, 8)."""

    def __init__(self, side: int):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, kernel_size=8 // side, stride=8 // side)
        self.hidden_size, self.num_patches_per_side = 8, side
        self.config = type("TowerConfig", (), {"image_size": 8})

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).transpose(1, 2)


class MergingModel(LLAMA.LlamaModel):
    """The decoder, with the arguments that Cambrian's takes besides Llama's own."""

    def forward(self, *args: Any, vision_tower_aux_feature_list: Any = None, **kwargs: Any) -> Any:
        for name in ("vision_tower_aux_attention_masks_list", "final_vision_feature_size", "global_context_feature"):
            kwargs.pop(name, None)
        return super().forward(*args, **kwargs)


class Merging(LLAMA.LlamaForCausalLM):
    """What both code bases share: images are merged in one method of the model, before the Llama forward."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = MergingModel(config)
        self.model.vision_tower = Tower(4)
        self.model.mm_projector = nn.Linear(8, config.hidden_size)
        self.model.image_newline = nn.Parameter(torch.randn(config.hidden_size))

    def get_model(self) -> nn.Module:
        return self.model

    def get_vision_tower(self) -> nn.Module:
        return self.model.vision_tower

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Any = None,
        image_sizes: Any = None,
        **options: Any,
    ) -> Any:
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels, *_ = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=image_sizes
                )
            )
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, **options
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor, images: Any = None, image_sizes: Any = None, **kwargs: Any) -> Any:
        position_ids, attention_mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        if images is None:
            embeds = self.get_model().embed_tokens(inputs)
        else:
            _, position_ids, attention_mask, _, embeds, *_ = self.prepare_inputs_labels_for_multimodal(
                inputs, position_ids, attention_mask, None, None, images, image_sizes=image_sizes
            )
        return super().generate(
            position_ids=position_ids, attention_mask=attention_mask, inputs_embeds=embeds, **kwargs
        )

    def merge(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, features: list[Tensor]) -> tuple:
        """Put `features` in place of the placeholders; returns embeddings, mask, positions and labels, padded anew."""
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        targets = torch.full_like(ids, IGNORED) if labels is None else labels
        rows, given = [], iter(features)
        for row_ids, row_targets, row_keep in zip(ids, targets, keep, strict=True):
            embeds, row_labels = [], []
            for token, target in zip(row_ids[row_keep], row_targets[row_keep], strict=True):
                merged = next(given) if token == IMAGE else self.model.embed_tokens(token[None])
                embeds.append(merged)
                row_labels += [IGNORED] * len(merged) if token == IMAGE else [int(target)]
            if not (row_ids[row_keep] == IMAGE).any():
                next(given)  # a row without an image has features all the same, which are dropped
            rows.append((torch.cat(embeds), torch.tensor(row_labels)))
        longest = max(len(row_labels) for _, row_labels in rows)
        embeds = ids.new_zeros((len(rows), longest, self.config.hidden_size), dtype=self.lm_head.weight.dtype)
        merged_labels, real, positions = (ids.new_full((len(rows), longest), fill) for fill in (IGNORED, 0, 0))
        for index, (row_embeds, row_labels) in enumerate(rows):
            count = len(row_labels)
            left = self.config.tokenizer_padding_side == "left"
            place = slice(longest - count, longest) if left else slice(0, count)
            embeds[index, place], merged_labels[index, place] = row_embeds, row_labels
            real[index, place], positions[index, place] = 1, torch.arange(count)
        return (
            embeds,
            None if mask is None else real.to(mask.dtype),
            positions,
            None if labels is None else merged_labels,
        )


class LlavaLlamaForCausalLM(Merging):
    """LLaVA's signature: six results."""

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        features = list(self.model.mm_projector(self.model.vision_tower(images)))
        embeds, mask, positions, labels = self.merge(input_ids, attention_mask, labels, features)
        return None, None if position_ids is None else positions, mask, past_key_values, embeds, labels


class CambrianLlamaForCausalLM(Merging):
    """Cambrian's signature: a list of images, one entry a tower; four more results; unpadding and newline tokens."""

    def __init__(self, config: Any):
        super().__init__(config)
        config.image_token_len = 16

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        image_aux_attention_masks_list=None,
        image_sizes=None,
    ):
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels, None, None, None, None
        towers = self.model.mm_projector(self.model.vision_tower(images[0]))
        features = []
        for tower, size in zip(towers, image_sizes, strict=True):
            height, width = unpadded(size)
            grid = tower.view(4, 4, -1)[(4 - height) // 2 :, (4 - width) // 2 :][:height, :width]
            newline = self.model.image_newline.expand(height, 1, -1)
            features.append(torch.cat([grid, newline], dim=1).flatten(0, 1))
        embeds, mask, positions, labels = self.merge(input_ids, attention_mask, labels, features)
        positions = None if position_ids is None else positions
        return None, positions, mask, past_key_values, embeds, labels, [towers], [None], image_sizes, towers.mean(1)


def unpadded(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what is left of a 4 x 4 grid for an image of `size` (width, height)."""
    width, height = size
    return (round(4 * height / width), 4) if width > height else (4, round(4 * width / height))
