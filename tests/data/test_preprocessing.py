"""Texts to numbers: the tokenizer's own result, cut and padded; what does not fit together is told."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fleetfit.data.preprocessing import TextPreprocessing

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "card", "was", "lost", "##s"]


def make_tokenizer(**vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)} | vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def make(num_tokens: int = 6, pad_id: int = 0, tokenizer: str | None = None) -> TextPreprocessing:
    return TextPreprocessing(tokenizer=tokenizer or make_tokenizer().to_str(), num_tokens=num_tokens, pad_id=pad_id)


def test_by_hand() -> None:
    numbers = make().apply(["the card", "", "the cards was lost", "the card was lost the card", "nothing"])
    assert numbers.dtype == np.int64
    assert numbers.tolist() == [
        [2, 4, 5, 3, 0, 0],
        [2, 3, 0, 0, 0, 0],
        [2, 4, 5, 8, 6, 3],  # "lost" is lost, [SEP] is not
        [2, 4, 5, 6, 7, 3],
        [2, 1, 3, 0, 0, 0],
    ]
    assert make(num_tokens=3, pad_id=8).apply(["the card", ""]).tolist() == [[2, 4, 3], [2, 3, 8]]
    assert make().apply([]).shape == (0, 6)


def test_texts_that_lose_their_end_are_counted() -> None:
    texts = ["the card was lost", "the card was lost the", "the cards was lost", ""]
    assert make().num_too_long(texts) == 2
    assert make(num_tokens=7).num_too_long(texts) == 0
    assert make(num_tokens=3).num_too_long(texts) == 3
    assert make().num_too_long([]) == 0


def test_what_the_file_says_of_length_and_padding_does_not_matter() -> None:
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20, pad_id=7)
    texts = ["the card was lost the card", "the"]
    assert np.array_equal(make(tokenizer=tokenizer.to_str()).apply(texts), make().apply(texts))
    # Two lengths of one tokenizer do not disturb each other.
    short, long = make(num_tokens=4), make(num_tokens=8)
    assert short.apply(texts).shape == (2, 4)
    assert long.apply(texts)[0].tolist() == [2, 4, 5, 6, 7, 4, 5, 3]
    assert short.apply(texts)[0].tolist() == [2, 4, 5, 3]


def test_it_travels_as_json_and_speaks_to_people() -> None:
    form = make()
    again = TextPreprocessing.model_validate_json(form.model_dump_json())
    assert again == form
    assert again.shape == (6,)
    assert form.words == (
        "numbers of the tokens that the tokenizer here cuts a text into, 6 at most, padded on the right with 0; "
        "[sample, 6]"
    )
    assert "##s" not in repr(form)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokenizer": "{}"}, r"tokenizer must be the content of a tokenizer\.json"),
        ({"tokenizer": ""}, r"tokenizer must be the content of a tokenizer\.json"),
        ({"num_tokens": 2}, "num_tokens must be > the 2 special tokens of every text, got 2"),
        ({"num_tokens": 1}, "greater than or equal to 2"),
        ({"pad_id": 9}, "pad_id must be < the vocabulary's 9, got 9"),
        ({"pad_id": -1}, "greater than or equal to 0"),
        ({"length": 5}, "Extra inputs"),
    ],
)
def test_what_does_not_fit_is_told(keys: dict[str, object], said: str) -> None:
    good = json.loads(make().model_dump_json())
    with pytest.raises(ValueError, match=said):
        TextPreprocessing.model_validate(good | keys)
