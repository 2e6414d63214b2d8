"""Which tokens are which image and how they lie: on inputs of real processors, and by what inputs and models say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import legacy_models
import tiny
from moda_attn.analysis import received_attention
from moda_attn.analysis.grid import RowImages, image_tokens
from moda_attn.config import TEXT, VISION
from moda_attn.errors import ModaValueError

WIDE = Image.fromarray((255 * np.random.default_rng(0).random((16, 32, 3))).astype(np.uint8))


def tokenizer(*special: str) -> hf.PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "what", "is", "this", "?"]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    result = hf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    result.add_tokens(list(special), special_tokens=True)
    return result


def idefics3() -> tuple[Any, str]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil as Images

    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    words = tokenizer("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *places)
    images = Images(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return hf.Idefics3Processor(images, words, image_seq_len=4), "<image>"


def aya_vision() -> tuple[Any, str]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil as Images

    words = tokenizer(
        *("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL", "TILE_1", "TILE_2")
    )
    images = Images(size={"height": 16, "width": 16}, max_patches=2)
    return hf.AyaVisionProcessor(images, words, patch_size=8, img_size=16), "<|IMG_PATCH|>"


def ovis2() -> tuple[Any, str]:
    from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil as Images

    words = tokenizer("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    images = Images(size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=2, max_patches=2)
    return hf.Ovis2Processor(images, words, image_seq_length=4), "<IMG_ATOM>"


#: Family -> its processor with the token of a patch; and which of the views of an image cut in two shows all of it.
PROCESSORS = {"idefics3": (idefics3, 2), "smolvlm": (idefics3, 2), "aya_vision": (aya_vision, 2), "ovis2": (ovis2, 0)}


@pytest.mark.skipif(tiny.RELEASE < (5, 0), reason="image processors without torchvision came with transformers 5")
@pytest.mark.parametrize("family", PROCESSORS)
def test_of_views_that_a_processor_cuts_the_whole_image_is_told_from_its_tiles(family: str):
    make, whole = PROCESSORS[family]
    processor, patch = make()
    inputs = processor(images=[WIDE, WIDE], text="what <image> is <image> this ?", return_tensors="pt")
    modality = (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(patch)).numpy().astype(int)
    columns = np.flatnonzero(modality[0]).reshape(6, 4)
    (row,) = image_tokens(model_of(family), inputs, modality)
    assert [image.grid for image in (*row.whole, *row.tiles)] == [(1, 2, 2)] * 6
    assert np.array_equal([image.columns for image in row.whole], columns[[whole, 3 + whole]])
    assert np.array_equal([tile.columns for tile in row.tiles], np.delete(columns, [whole, 3 + whole], axis=0))


def model_of(family: str, **config: Any) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(model_type=family, **config))


def views(family: str, spelled: str, **config: Any) -> RowImages:
    """Of a row such as "TIIIITT"."""
    modality = np.array([[int(letter == "I") for letter in spelled]])
    return image_tokens(model_of(family, **config), {}, modality)[0]


FAMILIES = ("llava-llama", "qwen2-vl", "mistral3", "gemma3", "paligemma", "aya-vision", "ovis2")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_grids_of_tiny_models(family: str):
    model, x = tiny.build(family), tiny.inputs(family, ["TITIT", "TTIT"])
    received = received_attention(model, **x)
    assert [[image.grid for image in row] for row in received.images] == [[(1, 2, 2)] * 2, [(1, 2, 2)]]
    assert received.tiles == ((), ())
    columns = np.concatenate([image.columns for image in received.images[0]])
    assert np.array_equal(columns, np.flatnonzero(received.modality[0] == VISION))


def test_grids_that_the_inputs_tell_of_images_of_other_shapes():
    modality = np.array([[0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    model = model_of("qwen2_vl", vision_config=SimpleNamespace(spatial_merge_size=2))
    rows = image_tokens(model, {"image_grid_thw": torch.tensor([[1, 4, 6], [2, 2, 4], [1, 2, 4]])}, modality)
    assert [[image.grid for image in row.whole] for row in rows] == [[(1, 2, 3), (2, 1, 2)], [(1, 1, 2)]]
    assert rows[0].whole[1].columns.tolist() == [8, 9, 10, 11]
    # A Pixtral tower keeps an image's shape, with or without merging its patches.
    pixtral = SimpleNamespace(model_type="pixtral", patch_size=4, image_size=64)
    (row,) = image_tokens(model_of("llava", vision_config=pixtral), {"image_sizes": [[8, 12]]}, modality[:1, :7])
    assert row.whole[0].grid == (1, 2, 3)


def test_views_that_stand_side_by_side():
    row = views("internvl", "IIIIIIIITIIIITIIIIII", image_seq_length=4)
    assert [image.columns.tolist() for image in row.whole] == [[4, 5, 6, 7], [9, 10, 11, 12], [*range(14, 20)]]
    assert [image.grid for image in row.whole] == [(1, 2, 2), (1, 2, 2), None]
    assert [tile.columns.tolist() for tile in row.tiles] == [[0, 1, 2, 3]]
    vision = SimpleNamespace(model_type="clip_vision_model", image_size=8, patch_size=4)
    row = views("llava_next", "TIIIIII", vision_config=vision, image_seq_length=576)
    assert [image.columns.tolist() for image in row.whole] == [[1, 2, 3, 4]]
    assert [(tile.grid, tile.columns.tolist()) for tile in row.tiles] == [(None, [5, 6])]
    # The tower's own token comes first where its features are taken in full.
    row = views("llava", 10 * "I", vision_config=vision, vision_feature_select_strategy="full")
    assert [image.columns.tolist() for image in row.whole] == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert views("got_ocr2", "IIII", image_seq_length=4).whole[0].grid == (1, 2, 2)


UNKNOWN = {
    "idefics2": ({}, "latents of a resampler"),
    "mllama": ({}, "cross-attention"),
    "got_ocr2": ({"image_seq_length": 4}, "may be pages or parts"),
    "idefics3": ({}, "neither the inputs nor the configuration say"),  # without input_ids
    "internvl": ({}, "neither the inputs nor the configuration say"),
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_what_has_no_grid_says_why(family: str):
    config, reason = UNKNOWN[family]
    (image,) = views(family, "TIIIIIIIIT", **config).whole
    assert image.grid is None
    assert reason in image.unknown


def test_a_map_without_a_grid_says_why_and_takes_one():
    model, x = tiny.build("idefics2"), tiny.inputs("idefics2", "TIT")
    received = received_attention(model, **x)
    with pytest.raises(ModaValueError, match="image 0 of row 0 has 3 tokens, and how they lie is not known: they"):
        received.heat_map()
    with pytest.raises(ModaValueError, match=r"how they lie is \(1, 2, 2\)"):
        received.heat_map(grid=(1, 2, 2))
    assert received.heat_map(grid=(1, 1, 3)).shape == (3, 1, 3)
    with pytest.raises(KeyError, match="answer query rows of text"):
        received.of(TEXT, answers_only=True)
    assert received.to_dict()["images"][0][0]["grid"] is None


def test_a_map_of_a_tile():
    model, x = tiny.build("llava-next-llama"), tiny.inputs("llava-next-llama", "TIT")
    received = received_attention(model, **x)
    ((tile,),) = received.tiles
    given = received.of(TEXT)[:, 0, tile.columns]
    assert received.heat_map(image=tile, grid=(1, 2, 3)).reshape(3, -1) == pytest.approx(given)
    with pytest.raises(ModaValueError, match=r"the tile of row 0 has 6 tokens, .* tokens between their lines"):
        received.heat_map(image=tile)
    assert received.heat_map().shape == (3, 2, 2)


@pytest.mark.parametrize("name", ["llava-standin", "cambrian-standin"])
def test_the_original_code(name: str):
    model, letters = legacy_models.build(name), ["TIT", "TITIT", "TT", "TTIIT"]
    received = received_attention(model, **legacy_models.inputs(name, letters))
    found = [[image.grid for image in row] for row in received.images]
    if name == "llava-standin":
        assert found == [[(1, 4, 4)] * count for count in (1, 2, 0, 2)]
        return
    # Images of 8 x 8, 20 x 10 and 10 x 20 pixels by turns on 4 x 4 patches, each line with a newline; of two that stand
    # side by side nothing tells where the first one ends.
    assert found == [[(1, 4, 4)], [(1, 2, 4), (1, 4, 2)], [], [None]]
    narrow = received.images[1][1]
    assert narrow.columns.tolist() == [12, 13, 15, 16, 18, 19, 21, 22]
    assert received.heat_map(row=1, image=1).shape == (3, 4, 2)
