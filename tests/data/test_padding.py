"""A word of a text is never masked, whatever number the model's config.json gives for the padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fleetfit.config.sections import ModelConfig
from fleetfit.core.randomness import seeded_init
from fleetfit.data.padding import choose_padding
from fleetfit.data.text_forms import text_form, untrained_backbone

torch.set_num_threads(1)

WORDS = ("[UNK]", "[CLS]", "the", "[PAD]", "card", "is", "[MASK]", "lost", "[SEP]", "##s", "late", "payment")
NUMBER = {word: number for number, word in enumerate(WORDS)}
TEXTS = ["the card is lost", "late", "lost cards is late payment", "card", "", "the payment is [PAD] late", "is is"]
NAMES = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta"}
SIZES: dict[str, dict[str, int]] = {
    "bert": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    "distilbert": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8},
}
SIZES["roberta"] = SIZES["bert"]


def word_tokenizer(ends: bool = True, words: tuple[str, ...] = WORDS) -> Tokenizer:
    number = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(number, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if ends:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", number["[SEP]"]), ("[CLS]", number["[CLS]"]))
    return tokenizer


def save(
    folder: Path, family: str, pad_token_id: int | None, tokenizer: Tokenizer | None = None, **names: Any
) -> transformers.PreTrainedModel:
    """A model whose config.json says ``pad_token_id``, all weights random, with a tokenizer that has its own."""
    config = getattr(transformers, f"{NAMES[family]}Config")(
        vocab_size=len(WORDS), max_position_embeddings=24, pad_token_id=NUMBER["[PAD]"], **SIZES[family]
    )
    with seeded_init(0, family):
        model = getattr(transformers, f"{NAMES[family]}Model")(config)
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text()) | {"pad_token_id": pad_token_id}
    (folder / "config.json").write_text(json.dumps(said))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"} | names
    own = {key: value for key, value in names.items() if value is not None}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer or word_tokenizer(), **own).save_pretrained(folder)
    return model.eval()


def computed(
    folder: Path, family: str, vocabulary: str = "trimmed", texts: list[str] = TEXTS
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """What fleetfit computes of the texts, where it sees a token, and what it told."""
    told: list[str] = []
    model = ModelConfig(family=family, pretrained=str(folder), vocabulary=vocabulary, frequent_tokens=3)
    form = text_form(model, texts, 10, told.append)
    with torch.no_grad():
        output = untrained_backbone(model, form).eval().run(torch.from_numpy(form.apply(texts)))
    assert output.mask is not None
    return output.output, output.mask, told


def expected(
    folder: Path, model: transformers.PreTrainedModel, texts: list[str] = TEXTS
) -> tuple[torch.Tensor, torch.Tensor]:
    """What Transformers computes of the same with the tokenizer's own attention mask, text by text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    output, mask = torch.zeros(len(texts), 10, 8), torch.zeros(len(texts), 10, dtype=torch.bool)
    for row, text in enumerate(texts):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        number = inputs["input_ids"].shape[1]
        with torch.no_grad():
            output[row, :number] = model(**inputs).last_hidden_state[0]
        mask[row, :number] = True
    return output, mask


@pytest.mark.parametrize("vocabulary", ["trimmed", "full"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("said", [None, -1, 9999, *(NUMBER[w] for w in ("[PAD]", "lost", "[SEP]", "[CLS]", "##s"))])
def test_the_tokenizers_own_padding_is_used_whatever_config_json_says(
    said: int | None, family: str, vocabulary: str, tmp_path: Path
) -> None:
    model = save(tmp_path, family, said)
    output, mask, told = computed(tmp_path, family, vocabulary)
    theirs, there = expected(tmp_path, model)
    assert torch.equal(mask, there)
    assert (output - theirs).abs().max() < 1e-5
    if said in (None, NUMBER["[PAD]"]):
        assert told == []
    else:
        (note,) = told
        assert f"pad_token_id {said} of its config.json is " in note
        assert "texts are padded with the tokenizer's own '[PAD]'" in note


@pytest.mark.parametrize("vocabulary", ["trimmed", "full"])
def test_roberta_still_counts_positions_from_the_number_that_config_json_gives(vocabulary: str, tmp_path: Path) -> None:
    save(tmp_path, "roberta", NUMBER["[MASK]"])
    model = transformers.RobertaModel.from_pretrained(tmp_path).eval()
    output, mask, told = computed(tmp_path, "roberta", vocabulary)
    theirs, there = expected(tmp_path, model)
    texts = [row for row, text in enumerate(TEXTS) if "[PAD]" not in text]  # it has the padding's position there
    assert torch.equal(mask, there)
    assert (output - theirs)[texts].abs().max() < 1e-5
    assert len(told) == 1


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("lost", "pad_token_id 7 of its config.json, from which the model counts positions, is the token 'lost'"),
        ("[SEP]", "pad_token_id 8 of its config.json, from which .* is the token '.SEP.', which texts hold"),
        (None, r"model\.config\.pad_token_id must be in 0\.\.vocab_size - 1 = 11, got None"),
        (9999, r"model\.config\.pad_token_id must be in 0\.\.vocab_size - 1 = 11, got 9999"),
    ],
)
def test_roberta_cannot_count_positions_from_what_texts_hold(said: str | int | None, why: str, tmp_path: Path) -> None:
    save(tmp_path, "roberta", NUMBER[said] if isinstance(said, str) else said)
    with pytest.raises(ValueError, match=rf"^model\.pretrained = .*: {why}"):
        computed(tmp_path, "roberta")


@pytest.mark.parametrize("pad", ["[SEP]", "[CLS]", "[UNK]", "lost"])
def test_a_tokenizer_that_pads_with_what_texts_hold_masks_none_of_it(pad: str, tmp_path: Path) -> None:
    model = save(tmp_path, "bert", NUMBER[pad], pad_token=pad)
    output, mask, told = computed(tmp_path, "bert")
    theirs, there = expected(tmp_path, model)
    assert torch.equal(mask, there)
    assert (output - theirs).abs().max() < 1e-5
    # The end of a text cannot be told from padding of the same kind, so another token has to pad.
    assert [": it pads with '[SEP]', which texts end with too; here '[MASK]' pads" in note for note in told] == [
        True
    ] * (pad == "[SEP]")


def test_a_tokenizer_that_pads_and_cuts_on_the_left_is_told(tmp_path: Path) -> None:
    model = save(tmp_path, "bert", NUMBER["[PAD]"], padding_side="left", truncation_side="left")
    output, _, told = computed(tmp_path, "bert")
    assert (output - expected(tmp_path, model)[0]).abs().max() < 1e-5
    assert [note.partition(": ")[2] for note in told] == [
        "its tokenizer pads texts on the left; here it pads them on the right",
        "its tokenizer cuts texts on the left; here it cuts them on the right",
    ]


def test_the_class_of_a_tokenizer_may_add_a_padding_that_the_model_has_not(tmp_path: Path) -> None:
    """Of a lone tokenizer.json, BertTokenizer makes one with a [PAD] of its own where the vocabulary has <pad>."""
    words = tuple("<pad>" if word == "[PAD]" else word for word in WORDS)
    model = save(tmp_path, "bert", NUMBER["[PAD]"], word_tokenizer(words=words), pad_token=None, mask_token=None)
    (tmp_path / "tokenizer_config.json").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == len(WORDS), "as it was when this was written"
    texts = [text for text in TEXTS if "[PAD]" not in text]  # three pieces here, and no row of the model there
    for vocabulary in ("trimmed", "full"):
        output, mask, told = computed(tmp_path, "bert", vocabulary, texts)
        theirs, there = expected(tmp_path, model, texts)
        assert torch.equal(mask, there)
        assert (output - theirs).abs().max() < 1e-5
        assert told == []


def test_a_vocabulary_with_two_paddings(tmp_path: Path) -> None:
    """The later one has the name; the number of the earlier one is no token any more."""
    save(tmp_path, "bert", 3, pad_token=None)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    twice = [word if word != "is" else "[PAD]" for word in WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(twice))
    model = transformers.BertModel.from_pretrained(tmp_path).eval()
    output, mask, told = computed(tmp_path, "bert", "full")
    theirs, there = expected(tmp_path, model)
    assert torch.equal(mask, there)
    assert (output - theirs).abs().max() < 1e-5
    assert "pad_token_id 3 of its config.json is no token of its tokenizer" in told[0]


# -- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            "lost",
            "its tokenizer names no padding, and pad_token_id 7 of its config.json is the word 'lost'; set pad_tok",
        ),
        ("##s", "its tokenizer names no padding, and pad_token_id 9 of its config.json is the word '##s'"),
        (9999, "its tokenizer names no padding, and pad_token_id 9999 of its config.json is no token"),
        (None, "its tokenizer names no padding, and pad_token_id None of its config.json is no token"),
        ("[SEP]", r"texts are padded with '\[SEP\]', but end with it too, and there is no other special token"),
    ],
)
def test_without_a_padding_that_is_known_it_is_an_error(said: str | int | None, why: str) -> None:
    tokenizer = word_tokenizer()
    if said == "[SEP]":
        tokenizer.add_special_tokens(["[SEP]"])
    with pytest.raises(ValueError, match=why):
        choose_padding(tokenizer.to_str(), None, NUMBER[said] if isinstance(said, str) else said)


def test_the_number_of_config_json_is_taken_where_the_tokenizer_names_none() -> None:
    assert choose_padding(word_tokenizer().to_str(), None, NUMBER["[PAD]"]).token == "[PAD]"
    tokenizer = word_tokenizer(words=tuple("[unused7]" if word == "[PAD]" else word for word in WORDS))
    assert choose_padding(tokenizer.to_str(), None, 3).token == "[unused7]"


def test_a_word_does_not_pad_where_a_text_may_end_with_it() -> None:
    tokenizer = word_tokenizer(ends=False)
    tokenizer.add_special_tokens(["lost", "[MASK]"])
    chosen = choose_padding(tokenizer.to_str(), "lost", NUMBER["lost"])
    assert chosen.token == "[MASK]"
    assert "'lost', which texts end with too" in chosen.note


def test_whatever_pads_a_saved_tokenizer_is_not_the_models_affair() -> None:
    """A tokenizer.json with padding switched on gives texts of one length; the empty text is still one of none."""
    tokenizer = word_tokenizer()
    tokenizer.enable_padding(pad_id=NUMBER["[PAD]"], pad_token="[PAD]", length=9)
    assert choose_padding(tokenizer.to_str(), "[PAD]", NUMBER["[PAD]"]).note == ""
