"""Trimming a vocabulary (Beyond, for text): half of a small text model is its table of tokens, of which it uses few.

Works on the content of a tokenizer.json, as the ``tokenizers`` library writes it. A text whose tokens are all kept is
cut into the same tokens afterwards; any other text into shorter ones, down to single characters.

Why it is the same: WordPiece takes the longest piece that it knows, and of fewer pieces the longest one is still there.
Byte-level BPE does the first merge of its list that is possible; all merges that make a kept token, or a part of one,
are kept, in their order, so each step finds the merge that it found before.
"""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.core.records import JsonDict

# Rows left free for words of one's own, which no text is cut into: of BERT, and of RoBERTa.
PLACEHOLDER = re.compile(r"\[unused\d+\]|madeupword\d+")


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A smaller tokenizer, and which rows of the old table of tokens its numbers stand for."""

    tokenizer_json: str
    tokens: Int[Tensor, " token"]


def trim_vocabulary(tokenizer_json: str, texts: Iterable[str], num_frequent: int) -> TrimmedVocabulary:
    """Keep what texts use, single characters, all special tokens, and the most frequent other ones.

    Args:
        tokenizer_json: The content of a tokenizer.json: WordPiece or byte-level BPE.
        texts: Whatever is public; every token that they use is kept.
        num_frequent: How many tokens of more than one character are kept besides, in the order of their numbers, which
            is about that of their frequency.

    Raises:
        ValueError: no tokenizer.json, another kind of tokenizer, or ``num_frequent`` below 0.
    """
    if num_frequent < 0:
        raise ValueError(f"num_frequent must be >= 0, got {num_frequent}")
    tokenizer, parts = _read(tokenizer_json)
    kind, model, padding = _kind(parts), parts["model"], parts.get("padding") or {}
    added = {token["content"]: int(token["id"]) for token in parts["added_tokens"]}
    everything: dict[str, int] = {**model["vocab"], **added}
    prefix = model.get("continuing_subword_prefix") or ""
    named = {model.get("unk_token"), padding.get("pad_token"), *_names(parts.get("post_processor") or {})}
    single = {token for token in model["vocab"] if len(token.removeprefix(prefix) or token) == 1}
    used = {token for text in texts for token in tokenizer.encode(text).tokens}
    ordinary = [t for t in model["vocab"] if t not in single and t not in added and not PLACEHOLDER.fullmatch(t)]
    frequent = sorted(ordinary, key=everything.__getitem__)[:num_frequent]
    kept = {*added, *named, *single, *used, *frequent} & everything.keys()
    if kind == "BPE":
        model["merges"], kept = _kept_merges(model["merges"], prefix, kept)
    # Tokens that only the list of added ones has get the last numbers when the tokenizer is read.
    order = sorted(kept, key=lambda token: (token not in model["vocab"], everything[token]))
    number = {token: i for i, token in enumerate(order)}
    model["vocab"] = {token: number[token] for token in order if token in model["vocab"]}
    for token in parts["added_tokens"]:
        token["id"] = number[token["content"]]
    if padding.get("pad_token") in number:
        padding["pad_id"] = number[padding["pad_token"]]
    _renumber(parts.get("post_processor") or {}, number)
    return TrimmedVocabulary(
        json.dumps(parts, ensure_ascii=False), torch.tensor([everything[token] for token in order])
    )


def _read(tokenizer_json: str) -> tuple[Any, JsonDict]:
    """The full tokenizer, without a longest length or padding, and the parts that it is made from."""
    from tokenizers import Tokenizer

    try:
        parts = json.loads(tokenizer_json)
        tokenizer = Tokenizer.from_str(tokenizer_json)
        parts["model"]["vocab"], parts["added_tokens"]
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"this is not the content of a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, parts


def _kind(parts: JsonDict) -> str:
    """WordPiece or BPE.

    Raises:
        ValueError: anything else, BPE on characters included: its symbols need not be in its vocabulary.
    """
    kind = parts["model"].get("type")
    byte_level = '"ByteLevel"' in json.dumps(parts.get("pre_tokenizer"))
    if kind == "WordPiece" or (kind == "BPE" and byte_level):
        return str(kind)
    found = "BPE that is not byte-level" if kind == "BPE" else repr(kind)
    raise ValueError(f"the tokenizer's model must be WordPiece or byte-level BPE, got {found}")


def _kept_merges(merges: list[Any], prefix: str, kept: Collection[str]) -> tuple[list[Any], set[str]]:
    """The merges that lead to the kept tokens, in their order, and these tokens with all parts on the way."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    results = [left + right.removeprefix(prefix) for left, right in pairs]
    parts: dict[str, list[str]] = {}
    for result, pair in zip(results, pairs, strict=True):
        parts.setdefault(result, []).extend(pair)
    needed: set[str] = set()
    waiting = list(kept)
    while waiting:
        token = waiting.pop()
        if token not in needed:
            needed.add(token)
            waiting += parts.get(token, [])
    return [merge for merge, result in zip(merges, results, strict=True) if result in needed], needed


def _names(post_processor: JsonDict) -> set[str]:
    """The tokens that a post-processor adds: [CLS], [SEP] and the like."""
    names = {token for special in post_processor.get("special_tokens", {}).values() for token in special["tokens"]}
    names |= {post_processor[key][0] for key in ("sep", "cls") if key in post_processor}
    return names.union(*(_names(inner) for inner in post_processor.get("processors", [])))


def _renumber(post_processor: JsonDict, number: dict[str, int]) -> None:
    """Give the tokens that a post-processor adds their new numbers, in place."""
    for special in post_processor.get("special_tokens", {}).values():
        special["ids"] = [number[token] for token in special["tokens"]]
    for key in ("sep", "cls"):
        if key in post_processor:
            post_processor[key] = [post_processor[key][0], number[post_processor[key][0]]]
    for inner in post_processor.get("processors", []):
        _renumber(inner, number)
