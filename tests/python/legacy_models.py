"""Tiny models in the manner of the original LLaVA and Cambrian-1 code, with random weights, and inputs for them.

Where the packages `llava` and `cambrian` are installed, their own classes are built beside the stand-ins, with a small
fake vision tower.
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

from legacy_standins import IMAGE, LLAMA, OLD, CambrianLlamaForCausalLM, LlavaLlamaForCausalLM, Tower, unpadded
from tiny_configs import PAD, TEXT, VOCABULARY


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
    config = cls(**TEXT)
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
