"""Which token pads a pre-trained model's texts: the tokenizer's own, whatever number the model's config.json gives.

A sample's tokens end where nothing but padding follows, so no other text may end with the token that pads.
"""

import json
import re
from dataclasses import dataclass

from fleetfit.models.vocabulary import PLACEHOLDER

NAME = re.compile(r"\W+pad(ding)?\W+", re.IGNORECASE)  # [PAD], <pad>, <|padding|>


@dataclass(frozen=True)
class Padding:
    """The token that pads, and what to tell of it; mostly nothing."""

    token: str
    note: str = ""


def choose_padding(
    tokenizer_json: str, named: str | None, number: int | None, positions_after_padding: bool = False
) -> Padding:
    """The token that pads: the tokenizer's own, or that of the model's configuration, or another that no text holds.

    Args:
        tokenizer_json: The content of a tokenizer.json.
        named: The tokenizer's own padding; None: it names none.
        number: ``pad_token_id`` of the model's config.json.
        positions_after_padding: The model counts a text's positions from that number, as RoBERTa does.

    Raises:
        ValueError: the tokenizer names no padding, and the number is that of a word; or positions are counted from a
            number that texts hold, which nobody can mean.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    special = {token["content"] for token in json.loads(tokenizer_json)["added_tokens"] if token["special"]}
    around = tokenizer.encode("").tokens  # what every text begins and ends with
    of_model = None if number is None or number < 0 else tokenizer.id_to_token(number)

    def no_word(token: str) -> bool:
        return token in special or bool(NAME.fullmatch(token) or PLACEHOLDER.fullmatch(token))

    def pads(token: str | None) -> bool:
        if token is None or not no_word(token):
            return False
        if not around:  # a text may end with whatever can be written
            return not token.isalnum()
        return token != around[-1]

    said = f"pad_token_id {number} of its config.json"
    if positions_after_padding and of_model is not None and (of_model in around or not no_word(of_model)):
        raise ValueError(
            f"{said}, from which the model counts positions, is the token {of_model!r}, which texts hold; its "
            f"tokenizer pads with {named!r}; correct config.json"
        )
    if named is None and (of_model is None or not no_word(of_model)):
        what = "no token" if of_model is None else f"the word {of_model!r}"
        raise ValueError(
            f"its tokenizer names no padding, and {said} is {what}; set pad_token in tokenizer_config.json"
        )
    free = sorted(token for token in special if token not in around)
    token = next(filter(pads, (named, of_model, *free)), None)
    if token is None:
        raise ValueError(
            f"texts are padded with {named or of_model!r}, but end with it too, and there is no other special token; "
            "add one to its tokenizer and its model, and set pad_token in tokenizer_config.json"
        )
    if token == named:
        if number in (None, tokenizer.token_to_id(token)):
            return Padding(token)
        is_that = "no token of its tokenizer" if of_model is None else f"the token {of_model!r}"
        return Padding(token, f"{said} is {is_that}; texts are padded with the tokenizer's own {token!r}")
    if named is None and token == of_model:
        return Padding(token)
    return Padding(token, f"it pads with {named or of_model!r}, which texts end with too; here {token!r} pads")
