"""Texts of the tokens that end a document, a message or a turn in common tokenizers: the only list of them."""

from collections.abc import Mapping

from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "[EOS]")
TURN_ENDS = (
    *("<|return|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<EOT>", "_<EOT>", "[EOT]"),
    *("<end_of_utterance>", "<turn|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>", "[e~["),
)
END_TOKENS = (*DOCUMENT_ENDS, *TURN_ENDS)
"""Tokens that end generated text: those that llama.cpp (llama-vocab.cpp) recognizes by their text.

Ends of documents come first: the first one that a vocabulary has also begins a text that has no other beginning.
"<eos>" precedes "</s>", which is an HTML tag in Gemma's vocabulary.
"""
SEPARATORS = (*END_TOKENS, "<|endofdocument|>", "[SEP]")
"""Tokens that can separate documents, in order of preference."""


def separator_id(tokenizer: Tokenizer) -> int | None:
    """The id of the first of `SEPARATORS` that the vocabulary has; None if it has none of them."""
    ids = map(tokenizer.token_to_id, SEPARATORS)
    return next((index for index in ids if index is not None), None)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens of a tokenizer: their ids by their texts."""
    return {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def ends_among(special_tokens: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the special tokens whose text is one of `END_TOKENS`, in that order.

    As in llama.cpp, "<|end|>" only separates messages in vocabularies that have "<|return|>" and "<|call|>" (gpt-oss)
    or "<|calls|>" and "<|flush|>".
    """
    names = special_tokens.keys()
    separates_messages = {"<|return|>", "<|call|>"} <= names or {"<|calls|>", "<|flush|>"} <= names
    ends = [text for text in END_TOKENS if text in special_tokens and not (separates_messages and text == "<|end|>")]
    return tuple(special_tokens[text] for text in ends)


def known_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the special tokens of a tokenizer whose text is one of `END_TOKENS`, in that order."""
    return ends_among(special_ids(tokenizer))
