"""Tiny models in the manner of the original LLaVA and Cambrian-1 code, with random weights, and inputs for them.

Two stand-ins have the signatures of those code bases; they run on transformers' own Llama where that is version 4.37,
and on the one in `llama437` elsewhere. Where the packages `llava` and `cambrian` are installed, their own classes are
built too, with a small fake vision tower.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import llama437

OLD = transformers.__version__.startswith("4.37.")
LLAMA: Any = importlib.import_module("transformers.models.llama.modeling_llama") if OLD else llama437

IMAGE, IGNORED, PAD, VOCABULARY = -200, -100, 0, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
#: What only a configuration of transformers takes.
EXTRA = {"max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}


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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Any = None,
        image_sizes: Any = None,
        return_dict: bool | None = None,
    ) -> Any:
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels, *_ = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=image_sizes
                )
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
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


@dataclass(frozen=True)
class Code:
    """A code base, with what the tests must know about it.

    Attributes:
        make: (attention implementation, padding side) -> the model.
        images: number of images -> arguments of forward that bring them.
        tokens: of image i -> number of positions that its features take.
        package: that must be installed; None for a stand-in.
        loose: rows may have any number of images, at any place.
    """

    make: Callable[[str, str], nn.Module]
    images: Callable[[int], dict[str, Any]]
    tokens: Callable[[int], int]
    package: str | None = None
    loose: bool = True

    def missing(self) -> str | None:
        """Why this code base cannot be built here."""
        if self.package is None:
            return None
        if importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return None if OLD else f"{self.package} needs transformers 4.37, this is {transformers.__version__}"


def _llama_config(cls: type, implementation: str, pad: str, **options: Any) -> Any:
    sizes = SIZES if cls is llama437.LlamaConfig else SIZES | EXTRA
    config = cls(**sizes)
    config._attn_implementation = implementation
    config.tokenizer_padding_side = pad
    for name, value in options.items():
        setattr(config, name, value)
    return config


def _standin(cls: type, implementation: str, pad: str) -> nn.Module:
    return cls(_llama_config(LLAMA.LlamaConfig, implementation, pad))


def _llava(merge: str, implementation: str, pad: str, language: str = "llama") -> nn.Module:
    module = importlib.import_module(f"llava.model.language_model.llava_{language}")
    config, cls = {"llama": ("LlavaConfig", "LlavaLlama"), "mistral": ("LlavaMistralConfig", "LlavaMistral")}[language]
    options = {"mm_patch_merge_type": merge, "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[16, 8], [8, 16]]}
    model = getattr(module, f"{cls}ForCausalLM")(_llama_config(getattr(module, config), implementation, pad, **options))
    model.model.vision_tower = Tower(2)
    model.model.mm_projector = nn.Linear(8, model.config.hidden_size)
    model.model.image_newline = nn.Parameter(torch.randn(model.config.hidden_size))
    return model


def _cambrian(projector: str, implementation: str, pad: str) -> nn.Module:
    module = importlib.import_module("cambrian.model.language_model.cambrian_llama")
    arch = importlib.import_module("cambrian.model.cambrian_arch")
    options = {
        "mm_projector_type": projector,
        "mm_vision_tower_aux_list": ["fake", "fake"],
        "mm_vision_tower_aux_token_len_list": [16, 64],
        "image_token_len": 16,
        "query_num_list": [16],
        "num_query_group": 1,
        "vision_hidden_size": 16,
        "connector_only": projector != "sva",
        "connector_depth": 1,
        "num_of_vision_sampler_layers": 2,
        "start_of_vision_sampler_layers": 0,
        "stride_of_vision_sampler_layers": 1,
        "image_position": 1,
    }
    sides = (4, 8) if projector == "sva" else (4, 4)
    real, arch.build_vision_tower_aux_list = arch.build_vision_tower_aux_list, lambda *_, **__: list(map(Tower, sides))
    try:
        model = module.CambrianLlamaForCausalLM(_llama_config(module.CambrianConfig, implementation, pad, **options))
    finally:
        arch.build_vision_tower_aux_list = real
    return model


IMAGE_SIZES = ((8, 8), (20, 10), (10, 20))


def _size(index: int) -> tuple[int, int]:
    return IMAGE_SIZES[index % 3]


def _pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _newlined(index: int) -> int:
    height, width = unpadded(_size(index))
    return height * (width + 1)


def _cambrian_images(count: int, towers: int) -> dict[str, Any]:
    return {"images": [_pixels(count, 3, 8, 8)] * towers, "image_sizes": [_size(index) for index in range(count)]}


def _anyres_images(count: int) -> dict[str, Any]:
    images = list(_pixels(count, 3, 3, 8, 8))
    return {"images": images, "image_sizes": [(16, 8) if index % 2 else (8, 16) for index in range(count)]}


def _square_images(count: int) -> dict[str, Any]:
    return {"images": _pixels(count, 3, 8, 8)}


_standins = {cls: functools.partial(_standin, cls) for cls in (LlavaLlamaForCausalLM, CambrianLlamaForCausalLM)}
_one_tower, _two_towers = (functools.partial(_cambrian_images, towers=towers) for towers in (1, 2))
_flat, _anyres = (functools.partial(_llava, merge) for merge in ("flat", "spatial_unpad"))
_linear, _sva = (functools.partial(_cambrian, projector) for projector in ("linear", "sva"))

CODES = {
    "llava-standin": Code(_standins[LlavaLlamaForCausalLM], _square_images, lambda _: 16),
    "cambrian-standin": Code(_standins[CambrianLlamaForCausalLM], _one_tower, _newlined),
    "llava": Code(_flat, _square_images, lambda _: 4, "llava"),
    "llava-anyres": Code(_anyres, _anyres_images, lambda index: 14 if index % 2 else 16, "llava"),
    "llava-mistral": Code(functools.partial(_flat, language="mistral"), _square_images, lambda _: 4, "llava"),
    "cambrian": Code(_linear, _two_towers, _newlined, "cambrian", loose=False),
    "cambrian-sva": Code(_sva, _two_towers, _newlined, "cambrian", loose=False),
}


@functools.cache
def _template(name: str, implementation: str, pad: str) -> nn.Module:
    # Apart from the test's own random numbers, which may not depend on what was built before it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20250710)
        model = CODES[name].make(implementation, pad)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # Weights of the usual size give flat attention: nothing that goes wrong in it would show in the logits.
        for parameter_name, weight in model.named_parameters():
            if weight.dim() > 1:
                strong = ".self_attn.q_proj" in parameter_name or ".self_attn.k_proj" in parameter_name
                weight.copy_((0.3 if strong else 0.15) * torch.randn(weight.shape, generator=generator))
        model.model.image_newline.copy_(torch.randn(model.config.hidden_size, generator=generator))
        model.get_input_embeddings().weight.copy_(torch.randn(VOCABULARY, 32, generator=generator))
    return model.eval()


def build(name: str, implementation: str = "sdpa", pad: str = "right") -> nn.Module:
    """A fresh copy of a tiny model in evaluation mode; always the same weights."""
    return copy.deepcopy(_template(name, implementation, pad))


def fake_cambrian() -> dict[str, types.ModuleType]:
    """What the page about Cambrian imports, around the stand-in with its signatures."""

    def load_pretrained_model(path: str, base: str | None, name: str, device: str = "cuda") -> tuple:
        return None, build("cambrian-standin"), None, 2048

    def process_images(images: list, processor: None, config: Any) -> list[Tensor]:
        return [_pixels(len(images), 3, 8, 8)]

    def tokenizer_image_token(prompt: str, tokenizer: None, image: int, return_tensors: str) -> Tensor:
        start, end = prompt.split("<image>")
        ids = [*(2 + ord(letter) % 60 for letter in start), image, *(2 + ord(letter) % 60 for letter in end)]
        return torch.tensor([1, *ids])

    contents = {
        "cambrian": {},
        "cambrian.constants": {"IMAGE_TOKEN_INDEX": IMAGE},
        "cambrian.mm_utils": {"process_images": process_images, "tokenizer_image_token": tokenizer_image_token},
        "cambrian.model": {},
        "cambrian.model.builder": {"load_pretrained_model": load_pretrained_model},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, content in contents.items():
        vars(modules[name]).update(content)
    return modules


def namespace(attention: nn.Module) -> dict[str, Any]:
    """The names beside the definition of an attention module's class."""
    return vars(sys.modules[type(attention).__module__])


def inputs(name: str, rows: list[str], pad: str = "right") -> dict[str, Any]:
    """Model inputs of rows such as "TTITT": T is a random text token, I an image's single placeholder."""
    generator = torch.Generator().manual_seed(11)
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens = torch.randint(2, VOCABULARY, (len(row),), generator=generator)
        tokens[[letter == "I" for letter in row]] = IMAGE
        place = slice(longest - len(row), longest) if pad == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = tokens, 1
    count = sum(max(1, row.count("I")) for row in rows)
    return {"input_ids": ids, "attention_mask": mask, **CODES[name].images(count)}


def truth(name: str, rows: list[str], pad: str = "right") -> Tensor:
    """(B, N) modality of the merged rows, written down without looking at any model."""
    spelled, image = [], 0
    for row in rows:
        modality: list[int] = []
        for letter in row:
            modality += [1] * CODES[name].tokens(image) if letter == "I" else [0]
            image += letter == "I"
        image += "I" not in row
        spelled.append(modality)
    longest = max(map(len, spelled))
    gaps = [[-1] * (longest - len(modality)) for modality in spelled]
    left = pad == "left"
    return torch.tensor([gap + row if left else row + gap for gap, row in zip(gaps, spelled, strict=True)])
