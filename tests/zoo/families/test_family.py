"""Families: both styles of configs, every field of them, and tables of names that cover every parameter once."""

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flaxzoo import zoo
from flaxzoo.layers.positions import scaling
from flaxzoo.layers.spec import Spec
from flaxzoo.zoo.families import registry, rope_config
from flaxzoo.zoo.families.config import ACTIVATIONS, INFORMATIONAL, LAYERS, Config, to_v5_fields
from flaxzoo.zoo.families.layer_pattern import pattern
from flaxzoo.zoo.families.names import units
from flaxzoo.zoo.families.registry import FAMILIES
from flaxzoo.zoo.parameters import describe
from safetensors.numpy import load_file, save_file

TRUTH = Path(__file__).parents[2] / "truth"
NAMES = sorted(path.parent.name for path in TRUTH.glob("*/config_v4.json"))
LLAMA = json.loads((TRUTH / "llama" / "config.json").read_text())


def fields_of(name: str, file: str = "config.json") -> dict:
    return json.loads((TRUTH / name / file).read_text())


# Fields that only say what layer_types (or no_rope_layers) would be if they were absent.
DEFAULTS = {"max_window_layers", "_sliding_window_pattern", "sliding_window_pattern", "no_rope_layer_interval"}
UNUSED = {"qwen3_moe": {"intermediate_size"}}  # of dense layers, and the checkpoint has none


@pytest.mark.parametrize("name", NAMES)
def test_both_styles_say_the_same(name):
    assert registry.read(fields_of(name)) == registry.read(fields_of(name, "config_v4.json"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_are_the_fields_that_were_read(name):
    fields = to_v5_fields(fields_of(name))
    _, written = registry.write(registry.read(fields), fields["model_type"])
    silent = INFORMATIONAL | DEFAULTS | UNUSED.get(name, set())
    matter = {n: v for n, v in fields.items() if n not in silent and v is not None}
    assert {n: v for n, v in written.items() if n not in silent and v is not None} == matter


@pytest.mark.parametrize("name", NAMES)
def test_no_field_is_ignored(name):
    """Each field is looked at: a value of the wrong type is refused by its name."""
    fields = fields_of(name)
    for field in fields.keys() - INFORMATIONAL:
        with pytest.raises(ValueError, match=re.escape(field)):
            registry.read(fields | {field: {"no": "such value"}})


@pytest.mark.parametrize("of", FAMILIES, ids=lambda of: of.model_types[0])
def test_every_family_has_a_truth(of):
    assert of.model_types[0] in {fields_of(name)["model_type"] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_table_names_every_tensor_once(name):
    decoder = registry.read(fields_of(name))
    found = units(registry.find(fields_of(name)).names, decoder, describe(decoder.abstract()))
    names = [name for unit in found for name in unit.names]
    assert sorted(names) == sorted(zoo.open_source(TRUTH / name).tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llamma"}, "no family has the model_type 'llamma'; did you mean 'llama'"),
        ({"model_type": None}, "no family has the model_type None"),
        ({"model_type": ["llama"]}, "no family has the model_type"),
        ({"hidden_size": None}, "model_type 'llama': the config has no hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number from 1 to 2147483647, got 64.0"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"vocab_size": 2**31}, "vocab_size must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1 to 4096, got 0"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be a whole number from 1 to 4096"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0, got nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number above 0, got 1000"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"hidden_act": "gelu_fastest"}, r"unknown hidden_act .activation. 'gelu_fastest'; did you mean"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported; supported: False"),
        ({"num_key_value_heads": 3}, "multiple of key/value heads, got heads=4, kv_heads=3"),
        ({"logit_scale": 0.1}, r"does not know: logit_scale=0.1. If .* pass ignore=\['logit_scale'\]"),
        ({"quantization_config": {"bits": 4}}, "quantized weights .* are not supported"),
        ({"rope_parameters": []}, "must be an object, got .."),
        ({"rope_parameters": {"rope_type": "spiral"}}, "unknown rope_type 'spiral'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_type='default' cannot have factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' lack some of"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor must be a finite number, got '2'"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta must be a finite number, got 1000"),
        ({"rope_parameters": {"rope_type": "linear", "factor": {"__float__": "Infinity"}}}, "must be a finite number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "bend": 1}}, "field of rope_parameters .*'bend'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate must be true or false"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": 1}}, "long_factors must be a list"),
    ],
)
def test_what_is_not_supported_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        registry.read(LLAMA | changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "=True is not supported; supported: False"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must be .* for each of 4 layers"),
        ("gemma2", {"layer_types": ["linear_attention"] * 4}, "full_attention or sliding_attention for each"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "there is no sliding_window"),
        ("smollm3", {"no_rope_layers": [1, 2, 3, 4]}, "no_rope_layers must be 0 or 1 for each of 4 layers"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported; supported: False"),
        ("deepseek_v2", {"topk_method": "best"}, "topk_method='best' is not supported; supported: 'greedy' or 'group_"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported; supported: 4"),
        ("deepseek_v3", {"n_group": 3}, "groups must divide the experts, .* experts=8, top_k=3, groups=3"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported; supported: 'sigmoid'"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported; supported: 1.702"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers must be a list of whole numbers, got 1"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias=True is not supported"),
        ("phi3", {"rope_parameters": {"type": "su"}}, "'longrope' lack some of"),
    ],
)
def test_options_of_single_families_are_told(name, changes, message):
    with pytest.raises(ValueError, match=message):
        registry.read(fields_of(name) | changes)


def test_fields_the_caller_vouches_for_are_ignored():
    assert registry.read(LLAMA | {"logit_scale": 0.1}, ignore=["logit_scale"]) == registry.read(LLAMA)


def test_absent_and_null_differ_where_null_switches_off():
    mistral, gemma2 = fields_of("mistral"), fields_of("gemma2")
    assert registry.read(mistral | {"sliding_window": None}).block[0].mixer.window is None  # pyright: ignore
    del mistral["sliding_window"], gemma2["final_logit_softcapping"]
    assert registry.read(mistral).block[0].mixer.window == 4096  # pyright: ignore
    assert registry.read(gemma2).soft_cap == 30.0
    assert registry.read(gemma2 | {"final_logit_softcapping": None}).soft_cap is None


def test_older_configs_leave_the_pattern_of_layers_to_the_family():
    for name, field in (("gemma2", "layer_types"), ("gemma3_text", "layer_types"), ("smollm3", "no_rope_layers")):
        fields = fields_of(name, "config_v4.json")
        del fields[field]
        assert registry.read(fields) == registry.read(fields_of(name)), name


def test_windows_of_qwen2_start_after_its_first_layers():
    fields = fields_of("qwen2") | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    del fields["layer_types"]
    decoder = registry.read(fields)
    assert [block.mixer.window for block in decoder.all_blocks] == [None, 5, 5]  # pyright: ignore
    assert (len(decoder.first), len(decoder.block)) == (1, 1)
    again = registry.write(decoder, "qwen2")[1]
    assert registry.read(again) == decoder


def test_dense_layers_among_experts():
    fields = fields_of("qwen3_moe") | {"mlp_only_layers": [0], "decoder_sparse_step": 2}
    decoder = registry.read(fields)
    assert [block.ffn.routed for block in decoder.all_blocks] == [False, True, False]
    assert decoder.all_blocks[0].ffn.hidden == 96  # pyright: ignore
    again = registry.write(decoder)[1]
    assert registry.read(again) == decoder
    dense = registry.read(fields_of("deepseek_v3") | {"first_k_dense_replace": 2})
    assert [block.ffn.routed for block in dense.all_blocks] == [False, False, True]
    assert registry.read(registry.write(dense)[1]) == dense


def test_a_layer_of_multi_token_prediction_is_no_part_of_the_model(tmp_path):
    tensors = load_file(TRUTH / "deepseek_v3" / "model.safetensors")
    more = {"model.layers.3.enorm.weight": np.ones(64, np.float32)}
    save_file(tensors | more, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields_of("deepseek_v3")))
    assert zoo.load(tmp_path)[0].spec.layers == 3
    save_file(tensors | {"model.layers.2.enorm.weight": np.ones(64, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"left over model.layers.2.enorm.weight"):
        zoo.load(tmp_path)


def test_the_first_gemma_says_gelu_and_means_its_approximation():
    fields = fields_of("gemma")
    assert registry.read(fields | {"hidden_act": "gelu"}) == registry.read(fields)
    assert registry.read(fields | {"hidden_act": "silu"}) != registry.read(fields)


SCALINGS: list[scaling.RopeScaling | None] = [
    None,
    scaling.LinearScaling(factor=2.0),
    scaling.DynamicNTKScaling(factor=2.0, original_length=32),
    scaling.ProportionalScaling(fraction=0.5, factor=2.0),
    scaling.Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=16),
    scaling.YarnScaling(factor=4.0, original_length=16),
    scaling.YarnScaling(
        factor=4.0, original_length=16, beta_fast=16.0, beta_slow=2.0, truncate=False, attention_factor=2.0
    ),
    scaling.YarnScaling(factor=4.0, original_length=16, mscale=0.7, mscale_all_dim=1.0),
    scaling.LongRopeScaling(short_factors=(1.0, 2.0), long_factors=(2.0, 3.0), original_length=16, length=64),
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_scaling_of_rope_goes_out_and_in(scaling):
    ours = zoo.Rope(theta=123.0, fraction=1.0, scaling=scaling)
    fields = rope_config.write(ours)
    parameters = rope_config.parameters_of(fields)
    assert rope_config.read(parameters, 1.0, fields.get("max_position_embeddings")) == ours
    scaling_of_v4 = {name: value for name, value in parameters.items() if name != "rope_type"}
    scaling_of_v4["type"] = parameters["rope_type"]
    older = {"rope_theta": 123.0, "rope_scaling": scaling_of_v4} | fields
    del older["rope_parameters"]
    assert Config(older).rope() == ours


def test_every_scaling_that_hugging_face_has_a_name_for_is_tried():
    known = {kind for kind, _ in rope_config.SCALINGS.values()}
    assert known == {type(scaling) for scaling in SCALINGS if scaling}
    assert set(ACTIVATIONS.values()) <= set(Spec._kinds["MLP"].__dataclass_fields__["activation"].type.__args__)  # pyright: ignore


def test_lengths_of_scalings_come_from_the_config_where_they_are_silent():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert rope_config.read(yarn, 1.0, 64).scaling == scaling.YarnScaling(factor=4.0, original_length=64)
    long = {"rope_type": "longrope", "short_factor": [1], "long_factor": [2], "original_max_position_embeddings": 16}
    longrope = rope_config.read(long | {"factor": 8.0}, 1.0, 64).scaling
    assert isinstance(longrope, scaling.LongRopeScaling)
    assert longrope.length == 128


@pytest.mark.parametrize(
    ("layers", "first", "period"),
    [("a", 0, 1), ("aaa", 0, 1), ("ababa", 0, 2), ("aab", 0, 3), ("abbb", 1, 1), ("aabbbb", 2, 1), ("abcbcb", 1, 2)],
)
def test_the_shortest_pattern_is_found(layers, first, period):
    plain = zoo.Block(mixer=zoo.Attention(heads=2, kv_heads=1, head_dim=8), ffn=zoo.GatedMLP(hidden=8))
    blocks = [plain.replace(**{"ffn.hidden": 8 + ord(letter)}) for letter in layers]
    found = pattern(blocks)
    assert (len(found["first"]), len(found["block"])) == (first, period)
    assert list(zoo.Decoder(vocab=8, dim=8, **found).all_blocks) == blocks


def test_the_pattern_of_as_many_layers_as_a_file_may_have_is_found_quickly():
    plain = zoo.Block(mixer=zoo.Attention(heads=2, kv_heads=1, head_dim=8), ffn=zoo.GatedMLP(hidden=8))
    blocks = [plain] * (LAYERS - 1) + [plain.replace(**{"ffn.hidden": 9})]
    began = time.perf_counter()
    assert pattern(blocks)["first"] == ()
    assert time.perf_counter() - began < 60  # hours, if every first block is tried with every period


def test_the_family_of_the_guide_is_the_one_that_is_here():
    root = Path(__file__).parents[3]
    code = re.findall(r"```python\n(.*?)```", (root / "docs" / "add-a-family.md").read_text(), re.DOTALL)
    assert code == [(root / "zoo" / "families" / "stablelm.py").read_text()]


DAMAGE = (None, "x", -1, 0, float("inf"), 10**400, [], {}, True, [None], {"a": {"b": [1]}})
OPTIONAL = ("rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "head_dim", "text_config")


def paths(config: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field of a config, also inside objects."""
    found = [(*path, name) for name in config]
    return found + [p for name, value in config.items() if isinstance(value, dict) for p in paths(value, (*path, name))]


@pytest.mark.parametrize("name", NAMES)
def test_damaged_fields_are_value_errors(name: str) -> None:
    """Any field may be absent, null or of a wrong type: the config is read, or ValueError says why not."""
    for file in ("config.json", "config_v4.json"):
        text = json.dumps(fields_of(name, file))
        for path in {*paths(json.loads(text)), *((field,) for field in OPTIONAL)}:
            for value in (*DAMAGE, "absent"):
                config = json.loads(text)
                holder = config
                for part in path[:-1]:
                    holder = holder[part]
                if value == "absent":
                    holder.pop(path[-1], None)
                else:
                    holder[path[-1]] = value
                with contextlib.suppress(ValueError):
                    registry.read(config)
