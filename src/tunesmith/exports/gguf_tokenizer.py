"""A tokenizer.json as llama.cpp's metadata.

llama.cpp has two kinds of tokenizers that concern us. SentencePiece's joins the neighbours whose token has the
highest score; as a tokenizer.json has the joins in order, a token's score is the negative place of the first that
makes it. GPT-2's has the joins themselves, and splits text beforehand by a rule that llama.cpp knows by a name.
"""

import re
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, TokenType

from tunesmith.base_models.prompts import PromptFormat
from tunesmith.errors import FailedPrecondition
from tunesmith.exports import templates

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREFIX = {"type": "Prepend", "prepend": "▁"}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {_SPLIT % r"\p{N}{1,3}": "llama-bpe", _SPLIT % r"\p{N}": "qwen2"}
"""llama.cpp's names of the rules by which text is split, by their regular expressions."""

Parsed = Mapping[str, Any]


def write(writer: GGUFWriter, tokenizer: Parsed, rows: int, form: PromptFormat, pad: int | None) -> None:
    """Add a tokenizer's metadata.

    Args:
        writer: Where to.
        tokenizer: A tokenizer.json.
        rows: Of the embedding; so many tokens are described.
        form: The prompt format, which says what opens a prompt and what ends an answer.
        pad: The padding token's id, if any.

    Raises:
        FailedPrecondition: llama.cpp has no such tokenizer.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise FailedPrecondition(f"{_NO_GGUF}: its tokenizer is of the kind {model['type']}.")
    tokens, types = _tokens(tokenizer, rows)
    if model.get("byte_fallback"):
        _sentencepiece(writer, tokenizer, tokens)
    else:
        _gpt2(writer, tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _special(writer, {token: place for place, token in enumerate(tokens)}, form, model.get("unk_token"), pad)
    writer.add_chat_template(templates.jinja(form))


_NO_GGUF = "This model cannot be exported as GGUF"


def _tokens(tokenizer: Parsed, rows: int) -> tuple[list[str], list[int]]:
    """Return the tokens in the order of their ids, and their types."""
    model = tokenizer["model"]
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, number in model["vocab"].items():
        if number < rows:
            is_byte = model.get("byte_fallback") and _BYTE.fullmatch(token)
            tokens[number], types[number] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        if (number := added["id"]) < rows:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            tokens[number], types[number] = added["content"], kind
    return tokens, [int(kind) for kind in types]


def _sentencepiece(writer: GGUFWriter, tokenizer: Parsed, tokens: list[str]) -> None:
    normalizer, split = tokenizer["normalizer"] or {}, tokenizer["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    # After the normalizer there are no spaces left to split at.
    if steps not in ([_SPACE], [_PREFIX, _SPACE]) or (split and split.get("pattern") != {"String": " "}):
        raise FailedPrecondition(f"{_NO_GGUF}: its tokenizer does not treat spaces in a way that llama.cpp knows.")
    merges = tokenizer["model"]["merges"]
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault(left + right, place)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(places.get(token, len(merges))) for token in tokens])
    writer.add_add_space_prefix(_PREFIX in steps)


def _gpt2(writer: GGUFWriter, tokenizer: Parsed) -> None:
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_rule(tokenizer))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def _rule(tokenizer: Parsed) -> str:
    """Return llama.cpp's name of the rule by which text is split before tokens are joined."""
    split = tokenizer["pre_tokenizer"] or {}
    *before, last = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    name = None
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if last.get("use_regex", True):
            name = {0: "gpt-2", 1: "smollm"}.get(len(before))
            if before and before != [{"type": "Digits", "individual_digits": True}]:
                name = None
        elif len(before) == 1 and before[0].get("type") == "Split":
            name = _RULES.get(before[0]["pattern"].get("Regex", ""))
    # llama.cpp never composes characters, which changes nothing for text that is composed, as nearly all is.
    normalizer = (tokenizer["normalizer"] or {"type": "NFC"})["type"]
    if name is None or normalizer != "NFC" or (tokenizer["model"].get("ignore_merges") and name != "llama-bpe"):
        raise FailedPrecondition(f"{_NO_GGUF}: llama.cpp has no name for how its tokenizer splits text.")
    return name


def _special(
    writer: GGUFWriter, ids: Mapping[str, int], form: PromptFormat, unknown: str | None, pad: int | None
) -> None:
    first = templates.first_token(form)
    writer.add_add_bos_token(first is not None)
    writer.add_add_eos_token(False)
    if first is not None:
        writer.add_bos_token_id(ids[first])
    writer.add_eos_token_id(ids[form.end.token])
    for stop in form.stops:
        if stop != form.end and stop.token in ids:
            writer.add_eot_token_id(ids[stop.token])
            break
    if unknown is not None and unknown in ids:
        writer.add_unk_token_id(ids[unknown])
    if pad is not None:
        writer.add_pad_token_id(pad)
