"""The `zoo` command: what it prints, and what it says when something is wrong: one message, no traceback."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flaxzoo import configs, zoo
from flaxzoo.configs import Run
from flaxzoo.train.commands import cli, plan, train
from flaxzoo.train.distributed import cluster
from flaxzoo.train.runs import loop
from flaxzoo.train.runs.folder import Folder
from flaxzoo.zoo.parameters import describe, split
from rich.console import Console
from tokenizers import Tokenizer

pytestmark = pytest.mark.usefixtures("quick_compiler")
TRUTH = Path(__file__).parents[2] / "truth"
Zoo = Callable[..., subprocess.Popen[str]]


@dataclass
class Said:
    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """`zoo ARGUMENTS` in this process, in the test's folder."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.chdir(tmp_path)
        code = 0
        capfd.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        return Said(code, *map(str, capfd.readouterr()))

    return run


@pytest.fixture(scope="module")
def trained(tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "words"
    loop.train(tiny.replace(steps=100, save_every=50), folder, console=Console(quiet=True))
    return folder


def error_of(said: Said, code: int = 1) -> str:
    assert said.code == code, said
    assert said.out == ""
    assert said.err.startswith("error: "), said.err
    assert "Traceback" not in said.err
    return said.err.removeprefix("error: ").removesuffix("\n")


# What it prints.


def test_usage(say: Command) -> None:
    plain, asked = say(), say("--help")
    assert plain == asked == say("-h")
    assert (plain.code, plain.err) == (0, "")
    for command in cli.COMMANDS:
        assert re.search(rf"^  zoo {command}\b", plain.out, re.MULTILINE), command
        shown = say(command, "--help")
        assert (shown.code, shown.err) == (0, "")
        assert f"usage: zoo {command}" in shown.out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["list"], ["list", "--help"]])
def test_short_commands_start_without_jax(arguments: list[str], environment: dict[str, str]) -> None:
    """No timing: what takes seconds to import is not imported."""
    code = (
        "import sys\n"
        "from flaxzoo.train.commands import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = 'jax flax optax orbax grain tensorstore tensorflow_datasets pyarrow tokenizers matplotlib IPython'\n"
        "print(sorted({*heavy.split()} & {*sys.modules}), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert process.stderr.splitlines()[-1] == "[]"


def test_placeholders_of_flags_are_words(say: Command) -> None:
    for command in [*cli.COMMANDS, "train shakespeare"]:
        shown = say(*command.split(), "--help").out
        assert not re.search(r"\b(STR|INT|FLOAT)\b|{None}", shown), command


def test_settings_in_the_help_have_groups() -> None:
    """Every setting of a run is in one group or has its own."""
    grouped = [name for names in train.GROUPS.values() for name in names]
    nested = {"model", "data", "optimizer", "balance"}
    assert sorted(grouped) == sorted({field.name for field in dataclasses.fields(Run)} - nested)


def test_version(say: Command) -> None:
    assert re.fullmatch(r"flaxzoo \d+\.\d+.*\n", say("--version").out)


def test_list(say: Command) -> None:
    said = say("list")
    assert (said.code, said.err) == (0, "")
    for name in configs.MODELS | configs.RUNS:
        assert re.search(rf"^  {name} +\d+(\.\d+)?[MG] +\S.*$", said.out, re.MULTILINE), name
    assert re.search(r"^  gpt2 +124M +GPT-2 124M \(Language Models", said.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # Hugging Face's counts; llama3_70b's and qwen's are on their model cards
        ("gpt2", "124,439,808"),
        ("llama3_8b", "8,030,261,248"),
        ("llama3_70b", "70,553,706,496"),
        ("qwen2_5_0_5b", "494,032,768"),
    ],
)
def test_show_counts_parameters(say: Command, name: str, parameters: str) -> None:
    said = say("show", name)
    assert (said.code, said.err) == (0, "")
    assert f"\n{name}: {parameters} parameters, " in said.out


def test_show(say: Command) -> None:
    said = say("show", "gpt2", "--length", "1024")
    assert re.search(r"^embedding\.table +V=50257 D=768 +float32 +147 MiB$", said.out, re.MULTILINE)
    assert re.search(r"^stack\.0\.mixer\.query\.bias +L=12 N=12 H=64 +float32 +36 KiB$", said.out, re.MULTILINE)
    assert "\nKV cache per token: 36 KiB in bfloat16\n" in said.out  # 12 layers x 2 x 768 x 2 bytes
    # 2 x (12 x 7,077,888 + 50,257 x 768) in matmuls, 12 x 4 x 512.5 x 768 in attention
    assert "\nFLOPs per token at 1024 tokens: 266M forward, 798M training\n" in said.out


def test_show_on_a_mesh(say: Command) -> None:
    said = say("show", "llama3_8b", "--mesh", "fsdp=4,tensor=8")
    assert (said.code, said.err) == (0, "")
    assert re.search(r"^stack\.0\.ffn\.gate\.weight +L=32 D=4096/fsdp F=14336/tensor +float32", said.out, re.MULTILINE)
    assert "\nllama3_8b: 8,030,261,248 parameters, 29.9 GiB\non each of 32 devices: 958 MiB\n" in said.out
    assert error_of(say("show", "llama3_8b", "--mesh", "tensor=16")) == (
        "mesh axis tensor=16 does not divide K=8 of parameter stack.0.mixer.key.weight (L D K H); "
        "tensor may be 1, 2, 4, 8"
    )
    assert "did you mean 'tensor'" in error_of(say("show", "llama3_8b", "--mesh", "tenser=16"))


def test_shard(say: Command) -> None:
    said = say("shard", "mixtral_8x7b", "--mesh", "expert=4,fsdp=2,tensor=2")
    assert (said.code, said.err) == (0, "")
    row = "L=32 E=8/expert D=4096/fsdp F=14336/tensor +32 2 2048 7168 +float32 +16 +1 +56 GiB +3.5 GiB"
    assert re.search(rf"^stack\.0\.ffn\.experts\.gate\.weight +{row}$", said.out, re.MULTILINE)
    assert "174 GiB of parameters, 12 GiB on each of 16 devices (1.10 copies of the model in all)" in said.out
    drawn = "  D=4096/fsdp down, K=8/tensor across\n  | 0,4,8,12  | 1,5,9,13  |\n  | 2,6,10,14 | 3,7,11,15 |\n"
    assert f"\nstack.0.mixer.key.weight, stack.0.mixer.value.weight\n{drawn}" in said.out
    assert (
        error_of(say("shard", "llama3_8b")) == "there is no mesh to split over; name one, e.g. --mesh fsdp=8,tensor=4"
    )
    assert "did you mean 'expert'" in error_of(say("shard", "mixtral_8x7b", "--mesh", "experts=4"))
    assert error_of(say("shard", "llama3_8b", "--mesh", "tensor=16")).endswith("tensor may be 1, 2, 4, 8")


def test_shard_of_a_run_as_json_and_as_a_picture(say: Command, tmp_path: Path) -> None:
    said = say("shard", "shakespeare", "--mesh", "fsdp=2,tensor=2", "--json", "--plot", "shards.png")
    assert (said.code, said.err) == (0, "")
    found, run = json.loads(said.out), configs.get_run("shakespeare")
    known = describe(run.model.abstract())
    assert {tensor["name"]: tuple(tensor["shape"]) for tensor in found["parameters"]} == {
        name: what.shape for name, what in known.items()
    }
    assert found["bytes"] == 4 * sum(what.size for what in known.values())
    assert found["bytes_per_device"] == sum(4 * np.prod(tensor["shard"]) for tensor in found["parameters"])
    tokens, stream = found["activations"]
    assert tokens["shard"] == [run.batch // run.accumulate // 2, run.length]
    assert stream["split"] == [["fsdp"], ["tensor"], []]
    assert (tmp_path / "shards.png").read_bytes().startswith(b"\x89PNG")


def test_show_and_diff_of_a_checkpoint(say: Command) -> None:
    said = say("show", TRUTH / "gemma2")
    assert (said.code, said.err) == (0, "")
    assert f"{TRUTH / 'gemma2'}: 158,784 parameters, " in said.out
    said = say("diff", TRUTH / "llama", TRUTH / "mistral")
    assert re.search(r"block.0.mixer.window +None +8", said.out)


def test_convert_a_run_and_back(say: Command, trained: Path) -> None:
    said = say("convert", trained, "exported", "--dtype", "bfloat16")
    assert (said.code, said.out) == (0, "wrote exported\n")
    ours, tokenizer = zoo.load(trained)
    again, theirs = zoo.load("exported")
    assert again.spec == ours.spec
    assert tokenizer is not None
    assert theirs is not None
    assert theirs.to_str() == tokenizer.to_str()
    for name, array in split(again).items():
        np.testing.assert_array_equal(array, split(ours)[name].astype(jnp.bfloat16))
    assert "28,192 parameters" in say("show", "exported").out
    assert "exported exists already" in error_of(say("convert", trained, "exported"))
    assert say("convert", trained, "exported.gguf").out == "wrote exported.gguf\n"
    assert zoo.load("exported.gguf")[0].spec == ours.spec
    assert "unknown dtype for other, a folder, 'bf16'; did you mean 'bfloat16'" in error_of(
        say("convert", trained, "other", "--dtype", "bf16")
    )


def test_show_and_diff_of_a_trained_run(say: Command, trained: Path) -> None:
    assert f"\n{trained}: 28,192 parameters, " in say("show", trained).out
    said = say("diff", trained, "shakespeare")
    assert re.search(rf"^steps +100 +{configs.RUNS['shakespeare']().steps} *$", said.out, re.MULTILINE)


def test_diff(say: Command) -> None:
    said = say("diff", "llama3_8b", "llama3_70b")
    settings = [line.split()[0] for line in said.out.splitlines()[1:]]
    assert settings == ["dim", "layers", "block.0.mixer.heads", "block.0.ffn.hidden"]
    assert say("diff", "gpt2", "gpt2").out == "gpt2 and gpt2 are the same\n"
    of_model = say("diff", "small", "bench_cpu")
    assert of_model.out == "small and bench_cpu are the same\n"


def test_train_help(say: Command) -> None:
    assert "shakespeare" in say("train").out
    said = say("train", "shakespeare", "--help")
    assert (said.code, said.err) == (0, "")
    for flag in (
        "--steps",
        "--data.source",
        "--model.dim",
        "--optimizer.learning-rate",
        "--fresh",
        "--step ",
        "--name",
    ):
        assert flag in said.out, flag
    assert f"(default: {configs.RUNS['shakespeare']().steps})" in said.out


# Training and writing.


def test_train_and_generate(say: Command, text: Path, tmp_path: Path) -> None:
    sizes = "--model.vocab 300 --model.dim 32 --model.layers 1 --batch 4 --length 16 --steps 2 --sample-every 0"
    said = say("train", "shakespeare", "--data.source", text, "--name", "mine", *sizes.split())
    assert (said.code, said.err) == (0, "")
    assert "\nTry next:\n  zoo generate runs/mine --prompt ROMEO.\n" in said.out
    run = Folder(tmp_path / "runs" / "mine").run()
    assert (run.data.source, run.steps, run.model.dim) == ((str(text),), 2, 32)
    (tmp_path / "my_run.json").write_text((tmp_path / "runs" / "mine" / "config.json").read_text())
    from_file = say("train", "my_run.json", "--steps", "1")
    assert (from_file.code, from_file.err) == (0, "")
    assert Folder(tmp_path / "runs" / "my_run").run() == run.replace(steps=1)
    again = say("train", "runs/mine")
    assert (again.code, again.err) == (0, "")
    assert "resumed from the checkpoint of step 2" in again.out
    refused = say("train", "runs/mine", "--optimizer.learning-rate", "0.5")
    rate = run.optimizer.learning_rate
    assert f"started with other settings:\n  optimizer.learning_rate: {rate} -> 0.5\n--allow-changes" in refused.err
    assert refused.code == 1


def test_generate(say: Command, trained: Path) -> None:
    greedy = ["generate", trained, "--prompt", "the cat", "--temperature", "0", "--max-tokens", "12"]
    first, again = say(*greedy), say(*greedy, "--seed", "5")
    assert (first.code, first.err) == (0, "")
    assert first.out == again.out
    assert first.out.startswith("the cat")
    assert set(first.out.removeprefix("the cat").split()) & {"sat", "on", "mat", "and", "a", "the", "but", "it"}
    drawn = ["generate", trained, "--prompt", "the cat", "--max-tokens", "20", "--samples", "2"]
    one, same, other = say(*drawn), say(*drawn), say(*drawn, "--seed", "1")
    assert one.out == same.out != other.out
    assert one.out.count("the cat") >= 2
    earlier = say(*drawn, "--step", "50")
    assert earlier.code == 0
    assert earlier.out != one.out
    split = say(*greedy, "--mesh", "fsdp=2,tensor=2")
    assert (split.code, split.out) == (0, first.out)


def test_eval(say: Command, trained: Path, tmp_path: Path) -> None:
    texts = {"one.txt": "the cat sat on the mat", "two.txt": "a dog and a cat"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in texts]
    found = json.loads(say("eval", trained, "--text", *files, "--json", "--length", "16", "--batch", "2").out)
    assert [found["texts"][file]["bytes"] for file in files] == [len(text) for text in texts.values()]
    assert found["all"]["documents"] == 2
    assert found["all"]["nll"] == pytest.approx(sum(found["texts"][file]["nll"] for file in files))
    assert found["all"]["bits_per_byte"] == pytest.approx(found["all"]["nll"] / math.log(2) / found["all"]["bytes"])
    shown = say("eval", trained, "--text", *files, "--length", "16").out
    assert f"{found['all']['perplexity']:.4f}" in shown
    assert "give --text FILES or --tasks NAMES" in error_of(say("eval", trained))


def test_chat(say: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no chat template; give one by --template FILE" in error_of(say("chat", trained))
    template = tmp_path / "plain.jinja"
    template.write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    lines = iter(["the cat", "/reset", "/what", KeyboardInterrupt, "the cat", "/help", "/exit"])

    def read(_: str) -> str:
        if isinstance(line := next(lines), str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    said = say("chat", trained, "--template", template, "--temperature", "0", "--max-tokens", "6")
    first, second = said.out.splitlines()
    assert first == second != ""
    assert "error: /what is not a command, and nothing was sent" in said.err
    assert said.err.count("/help shows this") == 3
    assert said.err.count("tokens/s, first token after") == 2


def test_a_named_model_starts_from_random_weights_and_says_so(say: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Run] = []
    monkeypatch.setattr(loop, "train", lambda run, *_, **__: runs.append(run))
    said = say("train", "gpt2")
    assert said.err == (
        "note: gpt2 starts from random weights. `zoo train openai-community/gpt2` starts from the pretrained ones.\n"
    )
    assert say("train", "small").err == "note: small starts from random weights.\n"
    assert say("train", "shakespeare").err == ""
    assert [run.dtype for run in runs] == ["float32"] * 3  # the tests run on CPUs


@pytest.mark.parametrize("name", ["gpt2", "shakespeare"])
def test_plan_and_train_have_the_same_defaults(name: str, say: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many devices of the same kind."""
    runs: list[Run] = []
    monkeypatch.setattr(loop, "train", lambda run, *_, **__: runs.append(run))
    monkeypatch.setattr(plan.report, "command", lambda run, *_, **__: runs.append(run))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 16)
    assert say("train", name).code == say("plan", name, "--topology", "v5e:4x4").code == 0
    assert runs[0] == runs[1]
    assert runs[0].batch == 16


def test_ignore_reaches_every_command_that_reads_a_model(say: Command, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(TRUTH / "llama", folder)
    config = json.loads((folder / "config.json").read_text()) | {"odd_field": 1}
    (folder / "config.json").write_text(json.dumps(config))
    for command in (["show", "odd"], ["shard", "odd", "--mesh", "fsdp=2"], ["diff", "odd", "gpt2"]):
        assert "odd_field" in error_of(say(*command))
        assert say(*command, "--ignore", "odd_field").code == 0
    assert "odd_field" in error_of(say("plan", "odd", "--topology", "v5e:1x1"))
    assert plan.parse(["odd", "--topology", "v5e:1x1", "--ignore", "odd_field"]).source.run("odd").ignore == (
        "odd_field",
    )


# What is wrong, said in one message.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "trainn",
            "unknown command 'trainn'; did you mean 'train'? Known: chat, convert, diff, eval, generate, list, plan, ",
        ),
        ("show gtp2", "unknown model or run 'gtp2'; did you mean 'gpt2' or "),
        ("diff gpt2 gpt3", "unknown model or run 'gpt3'; did you mean 'gpt2' or "),
        ("train shakespear", "unknown model or run 'shakespear'; did you mean 'shakespeare'? Known: bench_cpu, colab"),
        (
            "generate shakespear",
            "unknown model or run 'shakespear'; did you mean 'shakespeare'? Known: bench_cpu, colab",
        ),
        ("train gpt3", "unknown model or run 'gpt3'; did you mean 'gpt2' or "),
        ("plan gpt3 --topology v5e:1x1", "unknown model or run 'gpt3'; did you mean 'gpt2' or "),
        ("show gpt2 --text-only", "--ignore and --text-only are for checkpoints, and gpt2 is not one; leave them out"),
        ("train gpt2 --ignore x", "--ignore and --text-only are for checkpoints, and gpt2 is not one; leave them out"),
        ("train shakespeare --mesh data=3", "the mesh splits the batch 3 ways (data), which does not divide "),
        (
            "train shakespeare --mesh tensor=4",
            "mesh axis tensor=4 does not divide K=2 of parameter stack.0.mixer.key",
        ),
        ("train shakespeare --mesh fsdp=16", "mesh fsdp=16 needs 16 devices, there are 8; lower a size"),
        ("train shakespeare --mesh fdsp=2", "unknown mesh axis 'fdsp'; did you mean 'fsdp'"),
        ("train shakespeare --mesh 2x2", "a mesh is written 'fsdp=4,tensor=2': each axis once, with a size; got '2x2'"),
        ("train shakespeare --data.source no.txt", "no file, folder or glob matches 'no.txt' (searched from "),
        ("train shakespeare --data.source shakespare", "did you mean 'shakespeare'?"),
        ("train shakespeare --data.source empty.txt", "empty.txt must hold some text to train on, got none; is it"),
        ("train shakespeare --data.tokenizer no.json", "cannot read the tokenizer no.json: "),
        ("train shakespeare --model.vocab 200", "a byte-level vocabulary must be at least 257"),
        ("train shakespeare --step 7", "shakespeare has no checkpoint of step 7, nor any other; leave out --step"),
        ("generate runs/none", "runs/none holds no run: it has no config.json; `zoo train NAME` makes one"),
        ("generate shakespeare", "is a run to train: `zoo train shakespeare` first, then use runs/shakespeare"),
    ],
)
def test_mistakes(say: Command, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    error = error_of(say(*arguments.split()))
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train shakespeare --stpes 5", "--steps"),
        ("train shakespeare --steps many", "invalid literal for int"),
        ("train shakespeare --optimizer.name adam", "adamw"),
        ("train shakespeare --dtype float16", "bfloat16"),
        ("show", "required"),
        ("generate", "required"),
        ("list now", "now"),
    ],
)
def test_flags_that_are_none(say: Command, arguments: str, message: str) -> None:
    said = say(*arguments.split())
    assert said.code == 2
    assert "Traceback" not in said.err
    assert message in said.err


def test_settings_that_do_not_fit_each_other(say: Command) -> None:
    said = say("train", "shakespeare", "--accumulate", "3")
    assert said.code in (1, 2)
    assert "Traceback" not in said.err
    assert "batch must be a multiple of accumulate, got batch=16, accumulate=3" in re.sub(
        r"\s*│?\n│?\s*", " ", said.err
    )


def test_a_run_by_a_name_close_to_it(say: Command, trained: Path) -> None:
    assert error_of(say("generate", trained.with_name("wrods"))) == (
        f"unknown run in {trained.parent} 'wrods'; did you mean 'words'? Known: words"
    )
    assert "checkpoints of the steps [50, 100], but none of step 16" in error_of(say("generate", trained, "--step", 16))
    assert error_of(say("generate", trained, "--mesh", "fsdp=16")).startswith("mesh fsdp=16 needs 16 devices")
    assert error_of(say("generate", trained, "--temperature", "-1")).startswith("temperature must be at least 0")


def test_what_is_not_there(say: Command, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')  # is no run to name
    assert error_of(say("generate", "mine")).startswith("unknown model or run 'mine'. Known: ")
    assert error_of(say("chat", "mine.gguf")) == "there is no file mine.gguf"


def test_a_run_without_a_checkpoint(say: Command, tiny: Run, tmp_path: Path) -> None:
    Folder(tmp_path / "new").open(tiny).close()
    Folder(tmp_path / "new").write(tiny)
    assert error_of(say("generate", "new")) == (
        "there is no whole checkpoint in new/checkpoints, so there is nothing to restore"
    )


def test_a_tokenizer_of_another_vocabulary(say: Command, trained: Path, text: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "tokenizer.json", tmp_path / "other.json")
    size = Tokenizer.from_file(str(tmp_path / "other.json")).get_vocab_size()
    sizes = ["--model.dim", 24, "--model.layers", 1, "--steps", 1, "--sample-every", 0]
    flags = [*sizes, "--data.source", text, "--data.tokenizer", "other.json"]
    assert error_of(say("train", "shakespeare", *flags, "--model.vocab", size - 1)) == (
        f"the tokenizer's vocabulary must fit the model's, got {size} ids in other.json and a model of {size - 1}; "
        f"set --model.vocab {size}"
    )
    fixed = say("train", "shakespeare", *flags, "--model.vocab", size, "--batch", 2, "--length", 16)
    assert (fixed.code, fixed.err) == (0, "")


def test_runs_that_is_a_file(say: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = error_of(say("train", "shakespeare", "--runs", "file"))
    assert error.startswith("cannot write file/shakespeare: NotADirectoryError: Not a directory; ")
    assert "choose another --runs folder" in error


def test_a_traceback_where_it_is_asked_for(zoo: Zoo) -> None:
    for arguments, traced in ((["show", "nothing"], False), (["show", "nothing", "--traceback"], True)):
        process = zoo(*arguments)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (1, "")
        assert ("Traceback (most recent call last)" in err) == traced
        assert "unknown model or run 'nothing'" in err


def test_an_error_of_ours_is_named(say: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("what was that")

    monkeypatch.setattr(cli, "dispatch", fail)
    assert error_of(say("list")) == "RuntimeError: what was that\n(--traceback prints where)"


def test_a_reader_that_leaves(zoo: Zoo) -> None:
    process = zoo("train", "--help")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err


def test_help_waits_for_no_other_process(say: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "joined", lambda *_: pytest.fail("joined"))
    for asked in (("train", "-h"), ("train", "shakespeare", "--help"), ("eval", "--help")):
        assert say(*asked).code == 0


@pytest.mark.parametrize("arguments", ["train shakespeare", "generate runs/none", "show gpt2"])
def test_64_bits_are_refused(say: Command, arguments: str) -> None:
    with jax.enable_x64(True):
        assert "unset JAX_ENABLE_X64" in error_of(say(*arguments.split()))


def test_no_devices_are_touched_to_look(say: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("looked for devices"))
    assert say("show", "llama3_70b", "--mesh", "fsdp=64,tensor=8").code == 0
