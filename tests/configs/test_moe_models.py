"""Models with experts have as many parameters, in all and active in a token, as their authors say, in billions."""

import functools

import pytest
from flaxzoo.configs import get_model
from flaxzoo.configs.models import moe as moe_models
from flaxzoo.configs.named import functions_returning
from flaxzoo.train.commands import show
from flaxzoo.zoo import Decoder
from flaxzoo.zoo.families.registry import read, write
from flaxzoo.zoo.parameters import describe
from rich.console import Console

# The parameters of the checkpoint, and what papers and model cards write. Active ones are counted with the embedding
# (Mixtral, Qwen3) or without its table, of which a token takes one row (DeepSeek, gpt-oss).
PUBLISHED = {
    "mixtral_8x7b": (46_702_792_704, "46.7", "12.9", True),  # mistral.ai/news/mixtral-of-experts
    "qwen3_30b_a3b": (30_532_122_624, "30.5", "3.35", True),  # the card says 3.3
    "qwen3_235b_a22b": (235_093_634_560, "235", "22", True),
    "deepseek_v2": (235_741_434_880, "236", "21", False),
    "deepseek_v2_lite": (15_706_484_224, "15.7", "2.5", False),  # the card says 2.4
    "deepseek_coder_v2": (235_741_434_880, "236", "21", False),
    "deepseek_coder_v2_lite": (15_706_484_224, "16", "2.5", False),
    "deepseek_v3": (671_026_419_200, "671", "37", False),
    "gpt_oss_20b": (20_914_757_184, "20.91", "3.61", False),
    "gpt_oss_120b": (116_829_156_672, "116.83", "5.13", False),
}


@functools.cache
def model(name: str) -> Decoder:
    return get_model(name)


def rounded(count: int, like: str) -> str:
    return f"{count / 1e9:.{len(like.partition('.')[2])}f}"


def test_every_model_has_a_case() -> None:
    assert set(functions_returning(Decoder, moe_models)) == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    exact, total, active, with_embedding = PUBLISHED[name]
    decoder = model(name)
    count = sum(known.size for known in describe(decoder.abstract()).values())
    used = count - decoder.unused() - (0 if with_embedding else decoder.vocab * decoder.dim)
    assert count == exact
    assert (rounded(count, total), rounded(used, active)) == (total, active)


def test_zoo_show_tells_both(capsys: pytest.CaptureFixture[str]) -> None:
    show.table("deepseek_v2_lite", model("deepseek_v2_lite"), "expert=8", 2048, Console(width=300))
    shown = capsys.readouterr().out
    assert "15,706,484,224 parameters, 2,661,150,208 active in a token" in shown
    assert "L=26 E=64/expert D=2048 F=1408" in shown


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_of_hugging_face_describes_it(name: str) -> None:
    family, fields = write(model(name))
    assert read(fields) == model(name)
    assert family.model_types[0].split("_")[0] in name


def test_the_latent_cache_takes_576_numbers_a_token_and_layer() -> None:
    assert show.cache_bytes(model("deepseek_v3")) == 61 * 576 * 2
    assert show.cache_bytes(model("deepseek_v2_lite")) == 27 * 576 * 2
