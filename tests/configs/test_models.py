"""Named models have as many parameters as their checkpoints, and a Hugging Face config of their family."""

import math

import pytest
from flaxzoo.configs import get_model, models
from flaxzoo.configs.models import moe
from flaxzoo.configs.named import functions_returning
from flaxzoo.zoo import Decoder
from flaxzoo.zoo.families import registry
from flaxzoo.zoo.parameters import describe

# The sum over the tensors of the checkpoint, as the model's page on the hub has it ("safetensors": total). Qwen3 0.6B
# and 1.7B store their tied head besides, and Gemma 3 from 4B on a vision tower of 416,866,032 and a projection of
# 1152 (D + 1): these are subtracted.
PUBLISHED = {
    "gpt2": ("gpt2", 124_439_808),
    "gpt2_medium": ("gpt2", 354_823_168),
    "gpt2_large": ("gpt2", 774_030_080),
    "gpt2_xl": ("gpt2", 1_557_611_200),
    "llama2_7b": ("llama", 6_738_415_616),
    "llama2_13b": ("llama", 13_015_864_320),
    "llama2_70b": ("llama", 68_976_648_192),
    "llama3_8b": ("llama", 8_030_261_248),
    "llama3_70b": ("llama", 70_553_706_496),
    "llama3_1_8b": ("llama", 8_030_261_248),
    "llama3_1_70b": ("llama", 70_553_706_496),
    "llama3_1_405b": ("llama", 405_853_388_800),
    "llama3_2_1b": ("llama", 1_235_814_400),
    "llama3_2_3b": ("llama", 3_212_749_824),
    "mistral_7b_v0_1": ("mistral", 7_241_732_096),
    "mistral_7b_v0_3": ("mistral", 7_248_023_552),
    "gemma_2b": ("gemma", 2_506_172_416),
    "gemma_7b": ("gemma", 8_537_680_896),
    "gemma2_2b": ("gemma2", 2_614_341_888),
    "gemma2_9b": ("gemma2", 9_241_705_984),
    "gemma2_27b": ("gemma2", 27_227_128_320),
    "gemma3_270m": ("gemma3_text", 268_098_176),
    "gemma3_1b": ("gemma3_text", 999_885_952),
    "gemma3_4b": ("gemma3_text", 4_300_079_472 - 416_866_032 - 1152 * 2561),
    "gemma3_12b": ("gemma3_text", 12_187_325_040 - 416_866_032 - 1152 * 3841),
    "gemma3_27b": ("gemma3_text", 27_432_406_640 - 416_866_032 - 1152 * 5377),
    "phi3_mini_4k": ("phi3", 3_821_079_552),
    "phi3_medium_4k": ("phi3", 13_960_238_080),
    "phi4": ("phi3", 14_659_507_200),
    "qwen2_5_0_5b": ("qwen2", 494_032_768),
    "qwen2_5_1_5b": ("qwen2", 1_543_714_304),
    "qwen2_5_3b": ("qwen2", 3_085_938_688),
    "qwen2_5_7b": ("qwen2", 7_615_616_512),
    "qwen2_5_14b": ("qwen2", 14_770_033_664),
    "qwen2_5_32b": ("qwen2", 32_763_876_352),
    "qwen2_5_72b": ("qwen2", 72_706_203_648),
    "r1_distill_qwen_1_5b": ("qwen2", 1_777_088_000),
    "r1_distill_qwen_7b": ("qwen2", 7_615_616_512),
    "qwen3_0_6b": ("qwen3", 751_632_384 - 151_936 * 1024),
    "qwen3_1_7b": ("qwen3", 2_031_739_904 - 151_936 * 2048),
    "qwen3_4b": ("qwen3", 4_022_468_096),
    "qwen3_8b": ("qwen3", 8_190_735_360),
    "qwen3_14b": ("qwen3", 14_768_307_200),
    "qwen3_32b": ("qwen3", 32_762_123_264),
    "smollm2_135m": ("llama", 134_515_008),
    "smollm2_360m": ("llama", 361_821_120),
    "smollm2_1_7b": ("llama", 1_711_376_384),
    "smollm3_3b": ("smollm3", 3_075_098_624),
    "olmo2_1b": ("olmo2", 1_484_916_736),
    "olmo2_7b": ("olmo2", 7_298_617_344),
    "olmo2_13b": ("olmo2", 13_716_198_400),
    "olmo2_32b": ("olmo2", 32_234_279_936),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    described = describe(get_model(name).abstract())
    assert sum(math.prod(known.shape) for known in described.values()) == PUBLISHED[name][1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_family_can_express_it(name):
    decoder, kind = get_model(name), PUBLISHED[name][0]
    found, fields = registry.write(decoder, kind)
    assert found.model_types[0] == kind
    assert not registry.differences(decoder, registry.read(fields))


def test_every_model_of_these_files_is_here():
    named = set(functions_returning(Decoder, models)) - set(
        functions_returning(Decoder, moe)
    )  # those are in test_moe_models.py
    assert named - {"small"} == set(PUBLISHED)
