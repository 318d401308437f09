"""How texts become a model's inputs: by the pre-trained model's tokenizer, or one made from the public texts.

Tokenizer and model have to agree on the number of each token, so the model that starts with a form is made here too.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.config.sections import ModelConfig
from fleetfit.data.padding import choose_padding
from fleetfit.data.preprocessing import Preprocessing, TextPreprocessing
from fleetfit.models.elastic import Backbone
from fleetfit.models.families import family_of, text_config
from fleetfit.models.pretrained import base_config, load_pretrained, read_config_of
from fleetfit.models.vocabulary import trim_vocabulary

log = logging.getLogger(__name__)

LONGEST = 128
COVERED = 0.99  # of the public texts are not cut
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def text_form(
    model: ModelConfig, texts: Sequence[str], max_tokens: int | None, tell: Callable[[str], None] = lambda note: None
) -> TextPreprocessing:
    """The form of a job's model.

    Args:
        model: The job's model.
        texts: The cloud's public texts; no other text decides on anything.
        max_tokens: How long texts can be. None: long enough for 99 of 100 of these, at most 128.
        tell: Told, one note at a time, where what the model says and what its tokenizer says do not agree.

    Raises:
        ValueError: the pre-trained model is not there, or has no tokenizer of a supported kind, or none whose padding
            is known; more tokens than the model has positions for.
    """
    if model.pretrained:
        tokenizer_json, pad, notes = _pretrained_tokenizer(model)
    positions = positions_of(model)
    if max_tokens is not None and max_tokens > positions:
        raise ValueError(f"data.max_tokens must be <= the {positions} positions of the model, got {max_tokens}")
    if model.pretrained:
        for note in notes:
            log.warning("%s", note)
            tell(note)
        if model.vocabulary == "trimmed":
            try:
                tokenizer_json = trim_vocabulary(tokenizer_json, texts, model.frequent_tokens).tokenizer_json
            except ValueError as error:
                raise ValueError(
                    f'model.pretrained = {model.pretrained!r}: {error}; model.vocabulary = "full" keeps it as it is'
                ) from error
    else:
        tokenizer_json, pad = _own_tokenizer(model, texts)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if max_tokens is None:
        lengths = sorted(len(encoded.ids) for encoded in tokenizer.encode_batch(list(texts)))
        least = tokenizer.num_special_tokens_to_add(is_pair=False) + 1
        longest = lengths[math.ceil(COVERED * len(lengths)) - 1]
        max_tokens = max(least, min(longest, LONGEST, positions))
    pad_id = _number(tokenizer, pad)
    tokenizer.enable_truncation(max_tokens)  # whoever has the file needs no more to make inputs
    tokenizer.enable_padding(length=max_tokens, pad_id=pad_id, pad_token=pad)
    form = TextPreprocessing(tokenizer=tokenizer.to_str(), num_tokens=max_tokens, pad_id=pad_id)
    log.info("tokenizer: %d tokens; texts are cut to %d", tokenizer.get_vocab_size(), max_tokens)
    return form


def untrained_backbone(model: ModelConfig, form: Preprocessing | TextPreprocessing | None) -> Backbone:
    """The backbone that a reference starts as, made for these inputs.

    Raises:
        ValueError: it cannot be built or loaded.
    """
    if not isinstance(form, TextPreprocessing):
        if model.pretrained:
            return load_pretrained(model.pretrained, model.family)
        return Backbone(model.family, dict(model.config))
    if model.pretrained:
        tokens = _kept_tokens(model, form) if model.vocabulary == "trimmed" else None
        padding = form.pad_id if tokens is None else int(tokens[form.pad_id])
        return load_pretrained(
            model.pretrained, model.family, tokens=tokens, num_tokens=form.num_tokens, padding=padding
        )
    number = max(_numbers(form.tokenizer).values()) + 1
    sizes = text_config(
        model.family, dict(model.config), num_tokens=form.num_tokens, vocab_size=number, pad_token_id=form.pad_id
    )
    return Backbone(model.family, sizes)


def described_backbone(model: ModelConfig, form: Preprocessing | TextPreprocessing | None) -> Backbone:
    """What ``untrained_backbone`` gives, without weights, on the device "meta": sizes from the configuration alone.

    Raises:
        ValueError: the configuration is not there, of another family, or none of a model.
    """
    config = base_config(model.pretrained, model.family) if model.pretrained else dict(model.config)
    with torch.device("meta"):
        if not isinstance(form, TextPreprocessing):
            return Backbone(model.family, config)
        number = max(_numbers(form.tokenizer).values()) + 1
        if model.pretrained and model.vocabulary == "full":
            number = Backbone(model.family, config).config["vocab_size"]
        if model.pretrained:
            config = Backbone(model.family, config).config
        sizes = text_config(
            model.family, config, num_tokens=form.num_tokens, vocab_size=number, pad_token_id=form.pad_id
        )
        return Backbone(model.family, sizes)


def positions_of(model: ModelConfig) -> int:
    """How long texts can be that the model as it is takes, in tokens.

    Raises:
        ValueError: the model is not there, of another family, or counts positions from a padding that it does not have.
    """
    from transformers import CONFIG_MAPPING

    if model.pretrained:
        _, config = read_config_of(model.pretrained, model.family)
        family, sizes = family_of(model.family), CONFIG_MAPPING[model.family].from_dict(config)
        if family.positions_after_padding:
            try:
                family.check_text(sizes)
            except ValueError as error:
                raise ValueError(f"model.pretrained = {model.pretrained!r}: {error}") from error
        return family.num_tokens(sizes)
    with torch.device("meta"):  # builds nothing, but checks the configuration
        return Backbone(model.family, dict(model.config)).input_shape[0]


# -- the pre-trained model's ------------------------------------------------------------------------------------------


def _pretrained_tokenizer(model: ModelConfig) -> tuple[str, str, tuple[str, ...]]:
    """Its content, the token that pads, and what a person should be told of them.

    Raises:
        ValueError: there is none, or it does not go with the model.
    """
    from transformers import CONFIG_MAPPING, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    said = f"model.pretrained = {model.pretrained!r}"
    source, config = read_config_of(model.pretrained, model.family)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # of the hub, of JSON, of Transformers
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{said} has no tokenizer that can be read: {first}") from error
    finally:
        transformers_logging.set_verbosity(level)
    if not {*parts["model"]["vocab"]} - {token["content"] for token in parts["added_tokens"]}:
        raise ValueError(f"{said} has no tokenizer: no tokenizer.json and no list of tokens")
    sizes = CONFIG_MAPPING[model.family].from_dict(config)
    named = tokenizer.pad_token
    if named is not None and tokenizer.pad_token_id >= sizes.vocab_size:
        # Of the tokenizer's class, which adds its own where the vocabulary has another; the model has no row for it.
        parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] != named]
        named = None
    content = json.dumps(parts, ensure_ascii=False)
    too_many = max(_numbers(content).values()) + 1 - sizes.vocab_size
    if too_many > 0 and model.vocabulary == "full":
        raise ValueError(f"{said}: its tokenizer has {too_many} tokens more than its model")
    try:
        padding = choose_padding(content, named, sizes.pad_token_id, family_of(model.family).positions_after_padding)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from error
    notes = [f"{said}: {padding.note}"] if padding.note else []
    for what, side in (("pads", tokenizer.padding_side), ("cuts", tokenizer.truncation_side)):
        if side != "right":
            notes.append(f"{said}: its tokenizer {what} texts on the {side}; here it {what} them on the right")
    return content, padding.token, tuple(notes)


def _kept_tokens(model: ModelConfig, form: TextPreprocessing) -> Int[Tensor, " token"]:
    """Which rows of the pre-trained table of tokens the form's numbers stand for."""
    old = _numbers(_pretrained_tokenizer(model)[0])
    new = _numbers(form.tokenizer)
    lost = next((token for token in new if token not in old), None)
    if lost is not None:
        raise ValueError(f"model.pretrained = {model.pretrained!r}: its tokenizer no longer has the token {lost!r}")
    return torch.tensor([old[token] for token in sorted(new, key=new.__getitem__)])


def _number(tokenizer: Any, token: str) -> int:
    return int(tokenizer.token_to_id(token))


def _numbers(tokenizer_json: str) -> dict[str, int]:
    from tokenizers import Tokenizer

    numbers: dict[str, int] = Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    return numbers


# -- one's own --------------------------------------------------------------------------------------------------------


def _own_tokenizer(model: ModelConfig, texts: Sequence[str]) -> tuple[str, str]:
    """A tokenizer of the family's kind, made from texts, and the token that pads."""
    tokenizer = _byte_level(model, texts) if model.family == "roberta" else _word_pieces(model, texts)
    return tokenizer.to_str(), "<pad>" if model.family == "roberta" else "[PAD]"


def _word_pieces(model: ModelConfig, texts: Sequence[str]) -> Any:
    """Like BERT's: words without case, cut into their longest known pieces.

    The pieces are those that byte-pair encoding cuts words into, the commonest first. The trainer of word pieces in
    ``tokenizers`` gives another vocabulary each time, since it breaks ties by the order of a hash table.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
    size = model.config["vocab_size"]
    pairs = Tokenizer(models.BPE())
    pairs.train_from_iterator(words.elements(), trainers.BpeTrainer(vocab_size=size, show_progress=False))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        first, *others = pairs.encode(word).tokens
        counts.update({first: count})
        counts.update(Counter({f"##{piece}": others.count(piece) * count for piece in set(others)}))
    characters = sorted(set("".join(words)))
    known = dict.fromkeys((*BERT_TOKENS, *characters, *(f"##{character}" for character in characters)))
    common = sorted(counts.keys() - known.keys(), key=lambda piece: (-counts[piece], piece))
    vocabulary = [*known, *common[: max(0, size - len(known))]]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.add_special_tokens(list(BERT_TOKENS))
    ends = [(token, _number(tokenizer, token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(ends[0], ends[1])
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _byte_level(model: ModelConfig, texts: Sequence[str]) -> Any:
    """Like RoBERTa's: bytes, merged by how often they meet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=model.config["vocab_size"],
        special_tokens=list(ROBERTA_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, _number(tokenizer, token)) for token in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(ends[0], ends[1])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
