"""Tokenizers as metadata of GGUF files."""

import json
from collections.abc import Mapping

from tokenizers import Tokenizer, models, normalizers

from ...text_encoding import added_ids
from ..json_file import JsonObject
from ..sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, merges_of
from .tokenizer import strips_spaces_after
from .words import WORDS


def write_tokenizer(tokenizer: Tokenizer, rows: int, config: Mapping[str, object], name: str = "") -> JsonObject:
    """The metadata that `read_tokenizer` makes this tokenizer of.

    Args:
        tokenizer: a byte-level BPE, or a BPE that came from SentencePiece.
        rows: of the embedding. As many tokens are written: where the tokenizer has fewer, unused ones.
        config: tells which tokens begin and end a text.
        name: of the model, by which llama.cpp decides whether spaces after special tokens are removed.

    Raises:
        ValueError: the tokenizer is of another kind, splits words in a way that has no name in GGUF, or has merges that
            scores cannot express.
    """
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(f"GGUF can hold tokenizers of type BPE, got {model['type']}")
    _check_flags(tokenizer, state, name)
    tokens, types = _tokens(tokenizer, state, rows)
    metadata: JsonObject = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    if model["byte_fallback"]:
        metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", **_spaces(state)}
        metadata["tokenizer.ggml.scores"] = _scores(tokens, types, merges)
        metadata["tokenizer.ggml.unknown_token_id"] = tokens.index(model["unk_token"])
    else:
        metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _name_of_words(state)}
        metadata["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    return metadata | _ends(tokenizer, config)


def _check_flags(tokenizer: Tokenizer, state: JsonObject, name: str) -> None:
    """Raises ValueError where special tokens treat the text around them in a way that GGUF has no key for."""
    normalizer = tokenizer.normalizer
    normalized = (lambda text: text) if normalizer is None else normalizer.normalize_str
    texts = [token["content"] for token in state["added_tokens"]]
    strips = strips_spaces_after(name, texts)
    changed = [
        t["content"] for t in state["added_tokens"] if t["normalized"] and normalized(t["content"]) != t["content"]
    ]
    if changed:
        raise ValueError(
            "GGUF has no key for normalized=true of tokens, and without it these would match other text: "
            f"{', '.join(map(repr, changed[:5]))}; set normalized to false in tokenizer.json"
        )
    for flag, wanted in (("lstrip", set()), ("rstrip", strips), ("single_word", set())):
        unlike = [t["content"] for t in state["added_tokens"] if t[flag] != (t["content"] in wanted)]
        if unlike:
            raise ValueError(
                f"GGUF has no key for {flag} of tokens, and llama.cpp would read {', '.join(map(repr, unlike[:5]))} "
                f"differently in a model of the name {name!r} (it removes spaces after special tokens in models whose "
                f"name contains phi-3 or phi3, and in no others): change the name, or {flag} in tokenizer.json"
            )


def _tokens(tokenizer: Tokenizer, state: JsonObject, rows: int) -> tuple[list[str], list[int]]:
    vocab, model = tokenizer.get_vocab(with_added_tokens=True), state["model"]
    if max(vocab.values(), default=-1) >= rows:
        raise ValueError(f"a tokenizer's ids must be below the {rows} rows of the embedding, got {max(vocab.values())}")
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if model["byte_fallback"] else set()
    for token, index in vocab.items():
        tokens[index], types[index] = token, BYTE if token in bytes_ else NORMAL
    for added in state["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if not added["special"] and model["byte_fallback"]:
            # These are looked for in the text before spaces are replaced.
            tokens[added["id"]] = added["content"].replace(SPACE, " ")
    if model["byte_fallback"]:
        types[vocab[model["unk_token"]]] = UNKNOWN
    return tokens, types


def _steps(state: JsonObject | None) -> list[JsonObject]:
    """A pre-tokenizer's steps without what makes no difference."""
    if state is None:
        return []
    if state["type"] == "Sequence":
        return [step for part in state["pretokenizers"] for step in _steps(part)]
    plain = {"trim_offsets": state.get("trim_offsets"), "invert": False}
    step = {name: value for name, value in state.items() if name not in plain or value != plain[name]}
    return [{"use_regex": True, **step} if step["type"] == "ByteLevel" else step]


def _name_of_words(state: JsonObject) -> str:
    model = state["model"]
    for name, words in WORDS.items():
        plain = Tokenizer(models.BPE())
        plain.normalizer, plain.pre_tokenizer = words.normalizer(), words.pre_tokenizer()
        known = json.loads(plain.to_str())
        alike = known["normalizer"] == state["normalizer"] and words.whole == model.get("ignore_merges", False)
        if alike and _steps(known["pre_tokenizer"]) == _steps(state["pre_tokenizer"]):
            return name
    raise ValueError(
        f"the tokenizer splits words in a way that has no name in GGUF: {json.dumps(state['normalizer'])}, "
        f"{json.dumps(state['pre_tokenizer'])}; known are {', '.join(WORDS)}"
    )


def _spaces(state: JsonObject) -> dict[str, bool]:
    """Whether a space is put before the text."""
    replace, prepend = normalizers.Replace(" ", SPACE), normalizers.Prepend(SPACE)
    split = {"type": "Split", "pattern": {"String": " "}}  # finds nothing, as spaces were replaced
    steps = [{name: step[name] for name in split if name in step} for step in _steps(state["pre_tokenizer"])]
    for prefix, normalizer in ((False, replace), (True, normalizers.Sequence([prepend, replace]))):
        plain = Tokenizer(models.BPE())
        plain.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
        if json.loads(plain.to_str())["normalizer"] == state["normalizer"] and steps in ([], [split]):
            return {"tokenizer.ggml.add_space_prefix": prefix}
    raise ValueError(
        f"GGUF can replace spaces by {SPACE}, and put one before the text, got {json.dumps(state['normalizer'])} and "
        f"{json.dumps(state['pre_tokenizer'])}"
    )


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores that order merges as they are.

    Merges from or to tokens that are looked for in the text beforehand have no effect, and are left out.
    """
    plain = {token for token, type in zip(tokens, types, strict=True) if type in (NORMAL, UNUSED)}
    merges = [merge for merge in merges if {*merge, "".join(merge)} <= plain]
    order = {whole: -float(rank) for rank, whole in enumerate(dict.fromkeys("".join(merge) for merge in merges))}
    scores = [order.get(token, 0.0) for token in tokens]
    if merges_of(tokens, scores, types) != merges:
        raise ValueError(
            "GGUF orders a SentencePiece tokenizer's merges by one score for each token, and these have another order"
        )
    return scores


def _ends(tokenizer: Tokenizer, config: Mapping[str, object]) -> dict[str, bool]:
    added = added_ids(tokenizer)
    eos = config.get("eos_token_id")
    begin, end = config.get("bos_token_id"), eos[0] if isinstance(eos, list) else eos
    for begins, ends in ((False, False), (True, False), (False, True), (True, True)):
        if added == [*([begin] if begins else []), *([end] if ends else [])]:
            return {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    raise ValueError(
        f"GGUF can add bos_token_id={begin} before a text and eos_token_id={end} after it, the tokenizer adds {added}"
    )
