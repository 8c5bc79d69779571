"""Saving: what was loaded comes out bitwise as it was, and a failure leaves nothing."""

import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flaxzoo import zoo
from flaxzoo.train.distributed import mesh as meshes
from flaxzoo.zoo.families import registry
from flaxzoo.zoo.formats.save import OLDER, ModelSource, write_folder
from flaxzoo.zoo.parameters import split
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[2] / "truth"
NAMES = sorted(path.parent.name for path in TRUTH.glob("*/model.safetensors"))


def same(first: Path, second: Path) -> bool:
    ours, theirs = zoo.open_source(first), zoo.open_source(second)
    return ours.tensors == theirs.tensors and all(np.array_equal(ours.read(n), theirs.read(n)) for n in ours.tensors)


@pytest.mark.parametrize("style", ["config.json", "config_v4.json"])
@pytest.mark.parametrize("name", NAMES)
def test_out_again_is_bitwise_the_same(name, style, tmp_path):
    fields = json.loads((TRUTH / name / style).read_text())
    model, _ = zoo.load(TRUTH / name)
    zoo.save(model, tmp_path / "out", config=fields)
    assert same(tmp_path / "out", TRUTH / name)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == fields
    assert zoo.open_source(tmp_path / "out").tokenizer() is None


@pytest.mark.parametrize("name", NAMES)
def test_a_config_from_nothing_is_in_both_styles(name):
    """What only knows one of them would take the default of the other in silence."""
    model, _ = zoo.load(TRUTH / name)
    kind, decoder = zoo.open_source(TRUTH / name).config["model_type"], model.spec
    written = ModelSource(model, config={"model_type": kind}).config
    assert registry.read(written) == decoder
    assert registry.read({n: v for n, v in written.items() if n != "rope_parameters"}) == decoder
    assert registry.read({n: v for n, v in written.items() if n not in OLDER}) == decoder


def test_large_weights_are_split_over_files(tmp_path):
    model, _ = zoo.load(TRUTH / "llama")
    zoo.save(model, tmp_path / "out", shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 4
    sizes = [sum(v.nbytes for v in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 100_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert same(tmp_path / "out", TRUTH / "llama")


def test_another_dtype(tmp_path):
    model, _ = zoo.load(TRUTH / "phi3")
    zoo.save(model, tmp_path / "out", dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again, _ = zoo.load(tmp_path / "out", dtype=jnp.float32)
    for name, wanted in split(model).items():
        np.testing.assert_array_equal(split(again)[name], wanted.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_dtype_that_loses_the_weights_is_refused(tmp_path):
    model, _ = zoo.load(TRUTH / "phi3")
    large = jax.tree.map(lambda leaf: leaf + 1e6, model)
    for wanted, dtype, message in (
        (model, jnp.int8, "of floating point, and dtype=int8"),
        (large, jnp.float16, r"float16 holds magnitudes up to 65504, and model.embed_tokens.weight has 1e\+06"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.save(wanted, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    zoo.save(large, tmp_path / "out")
    for dtype, message in ((jnp.int32, "dtype=int32 is not"), (jnp.float16, "float16 holds magnitudes up to 65504")):
        with pytest.raises(ValueError, match=message):
            zoo.load(tmp_path / "out", dtype=dtype)


def test_a_model_on_a_mesh(tmp_path):
    spec = zoo.load(TRUTH / "phi3")[0].spec
    model, _ = zoo.load(TRUTH / "phi3", mesh=meshes.for_parameters(spec, "fsdp=2,tensor=2"))
    zoo.save(model, tmp_path / "out", config={"model_type": "phi3"})
    assert same(tmp_path / "out", TRUTH / "phi3")


def test_the_tokenizer_and_its_special_tokens(tmp_path):
    model, _ = zoo.load(TRUTH / "llama")
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    zoo.save(
        model,
        tmp_path / "out",
        tokenizer=tokenizer,
        config={"model_type": "llama", "eos_token_id": [2, 1], "pad_token_id": -1},
    )
    again = zoo.load(tmp_path / "out")[1]
    assert again is not None
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.get_added_tokens_decoder()[2].special  # as transformers does with what tokenizer_config.json names
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}


def test_a_model_built_here_says_nothing_of_tokens(tmp_path):
    """Where a config is silent, transformers takes the ids of the family's first model."""
    decoder = zoo.Decoder(vocab=20, dim=16, layers=2, block=(BLOCK,))
    zoo.save(decoder.build(rngs=nnx.Rngs(0)), tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["model_type"], fields["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert [fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [None, None, None]
    assert zoo.load(tmp_path / "out")[0].spec == decoder


def test_a_changed_model_changes_the_config_it_came_with(tmp_path):
    fields = json.loads((TRUTH / "llama3_rope" / "config_v4.json").read_text())
    model, _ = zoo.load(TRUTH / "llama3_rope")
    model.spec = model.spec.replace(**{"block.0.mixer.rope": zoo.Rope(theta=123.0)})
    written = ModelSource(model, config=fields).config
    assert written["rope_parameters"] == {"rope_theta": 123.0, "rope_type": "default"}
    assert (written["rope_theta"], written["rope_scaling"]) == (123.0, None)
    assert written["max_position_embeddings"] == fields["max_position_embeddings"]


ATTENTION = zoo.Attention(heads=4, kv_heads=2, head_dim=4)
BLOCK = zoo.Block(mixer=ATTENTION, ffn=zoo.GatedMLP(hidden=24))


@pytest.mark.parametrize(
    ("changes", "model_type", "message"),
    [
        ({"block.0.mixer.sinks": True}, None, "no family can; the closest, 'llama', .*layer 0: mixer.sinks=True"),
        ({"block.0.mixer.sinks": True}, "qwen3", "the family 'qwen3' cannot express .*mixer.sinks=True"),
        ({"block.0.ffn": zoo.MLP(hidden=8)}, "llama", "a MLP where it has a GatedMLP"),
        ({"block.0.placement": "parallel"}, None, "placement='parallel' .only 'pre'."),
        ({"norm": None}, None, "norm.kind=None .only 'RMSNorm'."),
        ({"max_positions": 8}, "llama", "max_positions=8 .only 0."),
        ({"block": (BLOCK, BLOCK.replace(**{"mixer.heads": 2}))}, None, "layer 1: mixer.heads=2 .only 4."),
        ({}, "llamma", "no family has the model_type 'llamma'; did you mean 'llama'"),
    ],
)
def test_what_no_family_expresses_is_told(changes, model_type, message):
    decoder = zoo.Decoder(vocab=20, dim=16, layers=2, block=(BLOCK,)).replace(**changes)
    with pytest.raises(ValueError, match=message):
        registry.write(decoder, model_type)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    model, _ = zoo.load(TRUTH / "llama")
    with pytest.raises(ValueError, match="out exists already; choose another place"):
        zoo.save(model, tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").unlink()
    zoo.save(model, tmp_path / "out")
    assert same(tmp_path / "out", TRUTH / "llama")


class Failing:
    """A source that fails at its last tensor, with a full disk or an interruption."""

    def __init__(self, error: BaseException):
        inner = zoo.open_source(TRUTH / "llama")
        self.config, self.tensors, self._inner, self._error = inner.config, inner.tensors, inner, error

    def read(self, name: str) -> np.ndarray:
        if name == list(self.tensors)[-1]:
            raise self._error
        return self._inner.read(name)

    def tokenizer(self) -> None:
        return None


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path, error):
    (tmp_path / "out.partial").mkdir()  # of a process that was killed
    with pytest.raises(type(error)):
        write_folder(Failing(error), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder_or_no_checkpoint_is_told(tmp_path):
    model, _ = zoo.load(TRUTH / "llama")
    with pytest.raises(ValueError, match=r"out.gguf would be a folder: save_gguf and `zoo convert` write .gguf files"):
        zoo.save(model, tmp_path / "out.gguf")
    with pytest.raises(ValueError, match="a model in the form for decoding is not saved"):
        zoo.save(zoo.optimize_for_decoding(model, "float32"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"out takes 452,\d+ bytes, and 1,000 are free there"):
        zoo.save(zoo.load(TRUTH / "llama")[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_trained_parameter_is_saved_as_it_is(tmp_path):
    """Not the one that was loaded."""
    model, _ = zoo.load(TRUTH / "qwen3")
    changed = jax.tree.map(lambda leaf: leaf * 2, model)
    zoo.save(changed, tmp_path / "out", config=zoo.open_source(TRUTH / "qwen3").config)
    again, before = zoo.open_source(tmp_path / "out"), zoo.open_source(TRUTH / "qwen3")
    for name in before.tensors:
        np.testing.assert_array_equal(again.read(name), before.read(name) * 2)
