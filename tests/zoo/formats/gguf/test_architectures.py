"""Names, layouts and configs of every architecture, there and back, beside the names the `gguf` package knows."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from flaxzoo import zoo
from flaxzoo.zoo.families.layer_pattern import attentions
from flaxzoo.zoo.families.registry import read as read_config
from flaxzoo.zoo.formats.gguf import GgufFile, save_gguf
from flaxzoo.zoo.formats.gguf.architectures import ARCHITECTURES
from flaxzoo.zoo.formats.gguf.config import Metadata
from flaxzoo.zoo.formats.gguf.rules import Pair, Stacked
from flaxzoo.zoo.formats.gguf.save import architecture_for, complete_config
from flaxzoo.zoo.parameters import split
from safetensors.numpy import load_file

TRUTH = Path(__file__).parents[3] / "truth"
CHANGES = {"gemma2": {"query_pre_attn_scalar": 24}, "mistral": {"sliding_window": None}}
"""What the format cannot say of these checkpoints."""
MOE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 96,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
    "vocab_size": 160,
}
DEEPSEEK = {
    **MOE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**MOE, "num_local_experts": 4},
    "qwen3_moe": {**MOE, "head_dim": 24, "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 24, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
    "gpt_oss": {
        **MOE,
        "head_dim": 16,
        "num_local_experts": 4,
        "sliding_window": 8,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
}
ATTENTION = {f"self_attn.{x}_proj.weight": (rows, 64) for x, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64))}
SWIGLU = {"gate_proj.weight": (32, 64), "up_proj.weight": (32, 64), "down_proj.weight": (64, 32)}
EXPERTS = {f"mlp.experts.{e}.{name}": shape for e in range(4) for name, shape in SWIGLU.items()}
DEEPSEEK_LAYER = {
    "self_attn.kv_a_proj_with_mqa.weight": (40, 64),
    "self_attn.kv_a_layernorm.weight": (32,),
    "self_attn.kv_b_proj.weight": (128, 32),
    "self_attn.o_proj.weight": (64, 64),
    "mlp.gate.weight": (4, 64),
    **EXPERTS,
    **{f"mlp.shared_experts.{name}": shape for name, shape in SWIGLU.items()},
}
LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "mixtral": {
        **ATTENTION,
        "block_sparse_moe.gate.weight": (4, 64),
        **{f"block_sparse_moe.experts.{e}.w{w}.weight": (64, 64) for e in range(4) for w in (1, 2, 3)},
    },
    "qwen3_moe": {**ATTENTION, "self_attn.q_norm.weight": (24,), "mlp.gate.weight": (4, 64), **EXPERTS},
    "deepseek_v2": {**DEEPSEEK_LAYER, "self_attn.q_proj.weight": (96, 64)},
    "deepseek_v3": {
        **DEEPSEEK_LAYER,
        "self_attn.q_a_proj.weight": (24, 64),
        "self_attn.q_a_layernorm.weight": (24,),
        "self_attn.q_b_proj.weight": (96, 24),
        "mlp.gate.e_score_correction_bias": (4,),
    },
    "gpt_oss": {
        **ATTENTION,
        "self_attn.q_proj.bias": (64,),
        "self_attn.sinks": (4,),
        "mlp.router.weight": (4, 64),
        "mlp.router.bias": (4,),
        "mlp.experts.gate_up_proj": (4, 64, 96),
        "mlp.experts.gate_up_proj_bias": (4, 96),
        "mlp.experts.down_proj": (4, 48, 64),
        "mlp.experts.down_proj_bias": (4, 64),
    },
}
"""Two layers of what the architectures with experts hold, beside what all have."""
_ALL = {path.parent.name: json.loads((path.parent / "config.json").read_text()) for path in TRUTH.glob("*/truth.npz")}
_WRITTEN = {name for one in ARCHITECTURES for name in (one.model_type, *one.also)}
TINY = sorted(name for name, config in _ALL.items() if config["model_type"] in _WRITTEN)
UNKNOWN = sorted(_ALL.keys() - {*TINY} - {"gguf"})
"""Checkpoints of types that are not written as GGUF."""
RANDOM = [f"random {name}" for name in CONFIGS]
NAMES = [*TINY, *RANDOM]


def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors: a tiny checkpoint of transformers, or random ones."""
    kind = name.removeprefix("random ")
    if kind == name:
        config = json.loads((TRUTH / name / "config.json").read_text()) | CHANGES.get(name, {})
        return config, load_file(TRUTH / name / "model.safetensors")
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (160, 64), "model.norm.weight": (64,), "lm_head.weight": (160, 64)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in LAYERS[kind].items()}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (64,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (64,)
    config = {"model_type": kind, **CONFIGS[kind]}
    return config, {key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def stored(key: str, x: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """What a file of F16 gives back: the router, vectors, biases and learned positions lose nothing, the rest is F16.

    Gemma's norms are stored with 1 added.
    """
    x = x.astype(np.float32)
    if "norm" in key and config["model_type"].startswith("gemma"):
        return (x + np.float32(1)) - np.float32(1)
    exact = x.ndim == 1 or any(part in key for part in ("bias", ".gate.weight", "router.weight", "wpe"))
    return x if exact else x.astype(np.float16)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, memory: Any, tmp_path: Path) -> None:
    config, arrays = checkpoint(name)
    save_gguf(memory(config, arrays), tmp_path / "model.gguf")
    file = GgufFile(tmp_path / "model.gguf")
    assert file.tensors.keys() == arrays.keys()
    for key, x in arrays.items():
        found, wanted = file.read(key), stored(key, x, config)
        assert (found.shape, found.dtype) == (file.tensors[key].shape, file.tensors[key].dtype)
        assert found.dtype == wanted.dtype, key
        np.testing.assert_array_equal(found, wanted, err_msg=key)
    # A second time changes nothing at all.
    save_gguf(file, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_q8_0(name: str, memory: Any, tmp_path: Path) -> None:
    """Some rows are whole blocks, some are not; numbers are off by half a step of their block at most."""
    config, arrays = checkpoint(name)
    save_gguf(memory(config, arrays), tmp_path / "model.gguf", "Q8_0")
    file = GgufFile(tmp_path / "model.gguf")
    for key, x in arrays.items():
        found = file.read(key)
        assert (found.shape, found.dtype) == (file.tensors[key].shape, file.tensors[key].dtype)
        step = np.abs(x.astype(np.float32)).max() / 127
        np.testing.assert_allclose(found.astype(np.float32), x.astype(np.float32), atol=step, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", TINY)
def test_config(name: str, memory: Any, tmp_path: Path) -> None:
    """The config that comes back means the same model."""
    config, arrays = checkpoint(name)
    save_gguf(memory(config, arrays), tmp_path / "model.gguf")
    assert read_config(GgufFile(tmp_path / "model.gguf").config) == read_config(config)


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "llama3_rope"])
def test_load(name: str, memory: Any, tmp_path: Path) -> None:
    """`zoo.load` gives the model that the Hugging Face folder does, of the same numbers."""
    config, arrays = checkpoint(name)
    save_gguf(memory(config, arrays), tmp_path / "model.gguf")
    zoo.convert(tmp_path / "model.gguf", tmp_path / "folder")
    file, folder = (zoo.load(tmp_path / place, dtype="float32")[0] for place in ("model.gguf", "folder"))
    assert file.spec == folder.spec
    found, wanted = split(file), split(folder)
    assert found.keys() == wanted.keys()
    for parameter, value in wanted.items():
        np.testing.assert_array_equal(found[parameter], value)


@pytest.mark.parametrize("name", RANDOM)
def test_fields(name: str, memory: Any, tmp_path: Path) -> None:
    """Every field comes back."""
    config, arrays = checkpoint(name)
    save_gguf(memory(config, arrays), tmp_path / "model.gguf")
    found = GgufFile(tmp_path / "model.gguf").config
    scaling = {"rope_type": "yarn"} | {k: v for k, v in config.get("rope_scaling", {}).items() if k != "type"}
    wanted = config | ({"rope_scaling": scaling} if "rope_scaling" in config else {})
    assert {key: found.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str, memory: Any, tmp_path: Path) -> None:
    config = json.loads((TRUTH / name / "config.json").read_text())
    with pytest.raises(ValueError, match=f"of type '{config['model_type']}' cannot be written as GGUF; known are"):
        save_gguf(memory(config, {}), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    """GGUF's names are those that the `gguf` package has for the Hugging Face ones."""
    config, _ = checkpoint(name)
    architecture = architecture_for(config)
    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture.name)
    known, compared = gguf.get_tensor_name_map(kind, 2), 0
    for rule in architecture.rules_of(2):
        # The package's converter splits and renames the others itself.
        if (
            isinstance(rule, Pair | Stacked)
            and rule.gguf.endswith(".weight")
            and not rule.hf.endswith("kv_b_proj.weight")
        ):
            hf = rule.hf.replace("experts.{expert}.", "experts.").removesuffix(".weight")
            found = known.get_name(hf)
            assert found in (rule.gguf.removesuffix(".weight"), None)
            compared += found is not None
    assert compared >= 15


@pytest.mark.parametrize("model", ["smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m"])
def test_real_metadata(model: str) -> None:
    """The metadata of real files give the config that the model was published with."""
    folder = TRUTH / "gguf" / model
    values, wanted = (json.loads((folder / f"{name}.json").read_text()) for name in ("metadata", "config"))
    name = values["general.architecture"]
    metadata = Metadata(
        values=values, architecture=name, rows=wanted["vocab_size"], extra={}, tensors=frozenset(["token_embd.weight"])
    )
    architecture = next(one for one in ARCHITECTURES if one.name == name and one.when(metadata))
    found = architecture.config(metadata)
    of_the_file = ("vocab_size", "tie_word_embeddings", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
    assert {key: found.get(key) for key in wanted.keys() - set(of_the_file)} == {
        key: value for key, value in wanted.items() if key not in of_the_file
    }
    assert {key: value for key, value in found.items() if key not in wanted and value is not None} == (
        {"attention_bias": False, "mlp_bias": False} if name == "llama" else {}
    )


def test_groups_of_older_files() -> None:
    """Files of DeepSeek-V3 from before llama.cpp knew of groups do not say them."""
    config, _ = checkpoint("random deepseek_v3")
    architecture = architecture_for(config)
    values = architecture.metadata(config | {"n_routed_experts": 256, "n_group": 1, "topk_group": 1})
    found = []
    for left_out in ("", "expert_group_count"):
        said = {f"deepseek2.{key}": value for key, value in values.items() if key != left_out}
        metadata = Metadata(said, "deepseek2", rows=160, extra={}, tensors=frozenset())
        assert architecture.when(metadata)
        read = architecture.config(metadata)
        found.append((read["n_group"], read["topk_group"]))
    assert found == [(1, 1), (8, 4)]


@pytest.mark.parametrize("name", NAMES)
def test_absent_fields(name: str) -> None:
    """A config may leave out any field: what is written means the same as its absence, or the field is named."""
    full, arrays = checkpoint(name)
    architecture = architecture_for(full)
    written = 0
    for field in full.keys() - {"model_type"}:
        config = {key: value for key, value in full.items() if key != field}
        try:
            values = architecture.metadata(complete_config(config, architecture))
            rows = read_config(config).vocab
        except ValueError:
            continue
        metadata = Metadata(
            values={f"{architecture.name}.{key}": value for key, value in values.items()},
            architecture=architecture.name,
            rows=rows,
            extra=architecture.tables(complete_config(config, architecture)),
            tensors=frozenset({"blk.0.attn_q.bias"} if "model.layers.0.self_attn.q_proj.bias" in arrays else ()),
        )
        assert architecture.when(metadata)
        again = {**architecture.config(metadata), "vocab_size": rows}
        again["tie_word_embeddings"] = read_config(config).tied
        if config["model_type"] == "mistral":
            again["model_type"] = "mistral"
            del again["attention_bias"], again["mlp_bias"]
            again["sliding_window"] = None
        assert read_config(again) == read_config(config), field
        written += 1
    assert written > 4


GEMMA3 = {
    "gemma3.context_length": 64,
    "gemma3.embedding_length": 64,
    "gemma3.block_count": 6,
    "gemma3.attention.head_count": 4,
    "gemma3.feed_forward_length": 64,
    "gemma3.attention.head_count_kv": 4,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 8,
}
OLMO2 = {
    key.replace("gemma3", "olmo2"): value for key, value in GEMMA3.items() if key != "gemma3.attention.sliding_window"
}


def config_of(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    name = next(iter(values)).partition(".")[0]
    said = values | {f"{name}.{key}": value for key, value in changes.items()}
    metadata = Metadata(said, name, rows=5, extra={}, tensors=frozenset())
    architecture = next(one for one in ARCHITECTURES if one.name == name and one.when(metadata))
    return {**architecture.config(metadata, said.get(f"{name}.ignored", ())), "vocab_size": 5}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 4096),
        ("attention.sliding_window_pattern", 4),
        ("attention.clamp_kqv", 8.0),
        ("attention.scale", 0.5),
        ("attention.value_length", 8),
        ("logit_scale", 2.0),
        ("rope.dimension_sections", [4, 2, 2]),
        ("rope.scaling.attn_factor", 1.5),
        ("rope.freq_base_swa", 1e4),
        ("expert_count", 8),
        ("nextn_predict_layers", 1),
        ("a_key_of_tomorrow", True),
    ],
)
def test_keys_that_are_not_known_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key.rpartition(".")[2]):
        config_of(OLMO2, **{key: value})


def test_keys_without_effect() -> None:
    plain = config_of(OLMO2)
    neutral = {"vocab_size": 5, "rope.scaling.finetuned": False, "attention.causal": True, "expert_count": 0}
    assert config_of(OLMO2, **neutral) == plain
    ignored = {"a_key_of_tomorrow": True, "ignored": ("olmo2.a_key_of_tomorrow", "olmo2.ignored")}
    assert config_of(OLMO2, **ignored) == plain


def test_rope_scaling_as_llama_cpp_reads_it() -> None:
    """Without a type a factor scales linearly; the older key counts where the newer is absent."""

    def scaling(**keys: Any) -> Any:
        return config_of(OLMO2, **keys).get("rope_scaling")

    linear = {"rope_type": "linear", "factor": 4.0}
    assert scaling(**{"rope.scaling.factor": 4.0}) == linear
    assert scaling(**{"rope.scale_linear": 4.0}) == linear
    assert scaling(**{"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}) == linear
    assert scaling(**{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}) == linear
    assert scaling(**{"rope.scaling.type": "none", "rope.scaling.factor": 4.0}) is None
    assert scaling(**{"rope.scaling.factor": 1.0}) is None
    yarn = scaling(**{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0})
    assert yarn["original_max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("pattern", "full"),
    [(None, [5]), (6, [5]), (3, [2, 5]), (1, range(6)), (0, []), (np.array([1, 0, 1, 1, 0, 0], bool), [1, 4, 5])],
)
def test_window_patterns(pattern: Any, full: Any) -> None:
    changes = {} if pattern is None else {"attention.sliding_window_pattern": pattern}
    config = config_of(GEMMA3, **changes)
    decoder = read_config(config)
    assert [layer for layer, mixer in enumerate(attentions(decoder)) if mixer.window is None] == list(full)
    if isinstance(pattern, np.ndarray):
        with pytest.raises(ValueError, match="follow no such pattern"):
            architecture_for(config).metadata(complete_config(config, architecture_for(config)))
    else:
        values = architecture_for(config).metadata(complete_config(config, architecture_for(config)))
        assert values.get("attention.sliding_window_pattern", 6) == (7 if pattern == 0 else pattern or 6)


def test_wrong_window_pattern() -> None:
    with pytest.raises(ValueError, match="must be a period, or 0 or 1 for each of 6 layers"):
        config_of(GEMMA3, **{"attention.sliding_window_pattern": np.array([1, 0])})
