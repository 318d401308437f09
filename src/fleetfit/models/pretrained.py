"""A backbone that starts from pre-trained weights: a folder that ``save_pretrained`` wrote, or a model of the hub."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fleetfit.core.records import JsonDict
from fleetfit.models.elastic import Backbone
from fleetfit.models.families import FAMILIES, family_of, own_keys, text_config
from fleetfit.models.weights import all_zero, first_few, not_finite

log = logging.getLogger(__name__)

CARD_FILE = "card.json"  # of a checkpoint of ``fleetfit pretrain``
QUANTIZED = ("I8", "U8", "F8_E4M3", "F8_E5M2")  # dtypes of weights that mean nothing without their scales
SPLIT_KEYS = ("public_share", "test_share", "edge_share", "validation_share", "limit", "splits")


def load_pretrained(
    name: str,
    family: str,
    *,
    tokens: Int[Tensor, " token"] | None = None,
    num_tokens: int | None = None,
    padding: int | None = None,
) -> Backbone:
    """The pre-trained model without its own task head, pooler, mask token and dropout, in 32 bits.

    Args:
        name: A folder, or a hub id; a model of the hub is kept in Hugging Face's cache folder.
        family: What the job says that it is.
        tokens: Of a text model: which rows of its vocabulary are kept, in their new order. None: all, as they are.
        num_tokens: Of a text model: how long texts can be; later positions are left out. None: as many as it has.
        padding: Of a text model: the row of its vocabulary that pads. None: the one that its config.json names. Where
            positions are counted from that one (``positions_after_padding``), they still are.

    Raises:
        ValueError: not there, no network, another or no supported family, a pickle, quantized; a tensor missing, of a
            wrong shape, or with values that are not finite; tokens that are not in its vocabulary or lack the padding,
            more tokens than it has positions for.
    """
    said = f"model.pretrained = {name!r}"
    source, config = read_config_of(name, family)
    if quantized := _quantized(source, config):
        raise ValueError(f"{said} is quantized ({quantized}); only weights of 16, 32 or 64 bits are read")
    if padding is not None and not family_of(family).positions_after_padding:
        config = {**config, "pad_token_id": padding}  # it says nothing else in these models
    if config.get("position_embedding_type", "absolute") != "absolute":  # no key of the classes any more
        raise ValueError(f"{said} has positions of type {config['position_embedding_type']!r}; only 'absolute' is read")
    try:
        backbone = Backbone(family, _kept(config, family))
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from error
    with silence():
        try:
            loaded, report = type(backbone.model).from_pretrained(  # type: ignore[attr-defined]
                source,
                config=backbone.model.config,
                revision=config.get("_commit_hash") or "main",
                dtype=torch.float32,
                use_safetensors=True,  # the other format is a pickle, which can run code
                ignore_mismatched_sizes=True,  # told below, with the others
                output_loading_info=True,
            )
        except Exception as error:  # of the hub, of safetensors, of the system
            raise ValueError(f"{said}: {_why_no_weights(source, error)}") from error
    own = backbone.model.state_dict()
    wrong = [f"{key} is missing" for key in sorted(report["missing_keys"]) if key in own]
    wrong += [
        f"{key} has shape {tuple(there)}, its config.json says {tuple(expected)}"
        for key, there, expected in sorted(report["mismatched_keys"])
        if key in own
    ]
    state = loaded.state_dict()
    weights = {key: state[key] for key in own}
    if wrong := wrong or not_finite(weights):  # of a foreign task head it does not matter
        raise ValueError(f"{said} has wrong weights: {first_few(wrong)}")
    if zeros := all_zero(weights):
        log.warning("%s: weights are all zero: %s", said, first_few(zeros))
    backbone.model.load_state_dict(weights, strict=True)
    if tokens is None and num_tokens is None and padding in (None, config.get("pad_token_id")):
        return backbone
    try:
        return _trimmed(backbone, tokens, num_tokens, padding)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from error


def _quantized(source: str, config: JsonDict) -> str:
    """How the weights are quantized; empty if they are not, as far as can be known before they are loaded.

    Transformers would take the integers for weights: they have the right shapes.
    """
    from safetensors import SafetensorError, safe_open

    if settings := config.get("quantization_config"):
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        return f"quantization_config of its config.json{f', {method}' if method else ''}"
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if (dtype := file.get_slice(key).get_dtype()) in QUANTIZED:
                        return f"{key} is of {dtype}"
        except (SafetensorError, OSError):
            return ""  # told by the one who loads it
    return ""


def _trimmed(
    backbone: Backbone, tokens: Int[Tensor, " token"] | None, num_tokens: int | None, pad: int | None
) -> Backbone:
    """The same text model with fewer rows of its tables of tokens and positions, and with another padding."""
    family = family_of(backbone.family)
    old: Any = backbone.model.config
    if family.kind != "text":
        raise ValueError(f"a {backbone.family!r} reads images; it has no vocabulary to trim")
    rows = torch.arange(old.vocab_size) if tokens is None else tokens.long()
    if rows.ndim != 1 or len(set(rows.tolist())) != len(rows) or bool(((rows < 0) | (rows >= old.vocab_size)).any()):
        raise ValueError(f"tokens to keep must be distinct and in 0..{old.vocab_size - 1}")
    pad = old.pad_token_id if pad is None else pad
    padding = (rows == pad).nonzero().flatten().tolist()
    if not padding:
        raise ValueError(f"tokens to keep must hold the padding's number {pad}")
    has = family.num_tokens(old)
    if num_tokens is not None and not 2 <= num_tokens <= has:
        raise ValueError(f"it has positions for 2 to {has} tokens, got {num_tokens}")
    config = text_config(
        backbone.family, backbone.config, num_tokens=num_tokens, vocab_size=len(rows), pad_token_id=padding[0]
    )
    smaller = Backbone(backbone.family, config)
    state = backbone.model.state_dict()
    token_key, position_key = f"{family.token_embedding}.weight", f"{family.position_embedding}.weight"
    state[token_key] = state[token_key][rows]
    first, last = family.first_position(old), family.first_position(old) + (num_tokens or has)
    unused = state[position_key].new_zeros(family.first_position(smaller.model.config), old.hidden_size)
    state[position_key] = torch.cat([unused, state[position_key][first:last]])
    smaller.model.load_state_dict(state, strict=True)
    return smaller


def fingerprint(name: str) -> str:
    """Changes when the pre-trained model does: digests of a folder's files, the commit of a model of the hub.

    Raises:
        ValueError: not there.
    """
    source, config = read_config(name)
    if not Path(source).is_dir():
        return str(config.get("_commit_hash"))
    digest = hashlib.sha256()
    for path in sorted([*Path(source).glob("config.json"), *Path(source).glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def base_config(name: str, family: str) -> JsonDict:
    """The keys of its config.json that shape the model.

    Raises:
        ValueError: not there, or of another or no supported family.
    """
    return _kept(read_config_of(name, family)[1], family)


def read_config_of(name: str, family: str) -> tuple[str, JsonDict]:
    """Where the model is, and its config.json.

    Raises:
        ValueError: not there, or of another or no supported family.
    """
    said = f"model.pretrained = {name!r}"
    source, config = read_config(name)
    found = config.get("model_type")
    if found not in FAMILIES:
        raise ValueError(f"{said} is a {found!r}, which is not supported; supported are {', '.join(FAMILIES)}")
    if found != family:
        raise ValueError(f"{said} is a {found!r}, but model.family is {family!r}; set model.family = {found!r}")
    return source, config


def read_config(name: str) -> tuple[str, JsonDict]:
    """Where the model is, and its config.json."""
    from transformers import PreTrainedConfig

    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"model.pretrained = {name!r} is a file; give the folder that it is in")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model.pretrained = {name!r}: the folder has no config.json; was it made by save_pretrained?"
            )
        source = str(folder)
    else:
        source = name
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
    except Exception as error:  # OSError for most, but not all
        first = str(error).strip().splitlines()[0]
        if folder.is_dir():
            raise ValueError(f"model.pretrained = {name!r}: config.json cannot be read: {first}") from error
        raise ValueError(
            f"model.pretrained = {name!r} is no folder here, and could not be had from the Hugging Face hub: {first} "
            f"{_offline()}"
        ) from error
    return source, dict(config)


def _offline() -> str:
    from huggingface_hub import constants

    return (
        f"Models that were had before are in {constants.HF_HUB_CACHE}; with HF_HUB_OFFLINE=1 nothing else is tried. "
        "Without a network, give a folder that save_pretrained wrote."
    )


def _kept(config: JsonDict, family: str) -> JsonDict:
    """The family's own keys; label names, dropout, other training settings and the like do not shape the model."""
    from transformers import CONFIG_MAPPING

    keys = [key for key in own_keys(CONFIG_MAPPING[family]) if key not in FAMILIES[family].dropouts]
    other = [key for key in config if key not in keys]
    log.debug("config.json: not used: %s", ", ".join(other))
    return {key: value for key, value in config.items() if key in keys}


def _why_no_weights(source: str, error: Exception) -> str:
    from safetensors import SafetensorError

    first = str(error).strip().splitlines()[0]
    folder = Path(source)
    if isinstance(error, SafetensorError):
        return f"its weights are corrupt: {first}"
    if not isinstance(error, OSError):
        return f"its weights cannot be loaded: {type(error).__name__}: {first}"
    if not folder.is_dir():
        return (
            f"its weights could not be had: {first} Only safetensors are read, since a pickle (pytorch_model.bin) can "
            f"run code; of such a model make a folder: {_conversion(source)}. {_offline()}"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            "its weights are a pickle, which can run code and is not read; if you trust it, convert it: "
            f"{_conversion(source)}, and give that folder"
        )
    return f"its weights cannot be read: {first}"


def _conversion(source: str) -> str:
    return f"transformers.AutoModel.from_pretrained({source!r}, use_safetensors=False).save_pretrained('converted')"


@contextmanager
def silence() -> Iterator[None]:
    """Transformers without bars and tables of tensors; what matters of them is an error here."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def other_split(name: str, data: Mapping[str, Any], seed: int) -> str:
    """What to tell of a checkpoint that was trained on samples that are not public in this job.

    They would be among those that accuracies are told of. Empty: there is nothing to tell.

    Args:
        name: ``model.pretrained``.
        data: The job's table of this name, in JSON's types.
        seed: The job's.
    """
    try:
        card = json.loads((Path(name).expanduser() / CARD_FILE).read_text(encoding="utf-8"))
        before, same_source = card["data"], card["data"]["source"] == data["source"]
        differs = [key for key in SPLIT_KEYS if before.get(key) != data[key]] + ["seed"] * (card["seed"] != seed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    if not same_source or not differs:
        return ""
    return (
        f"{name} was trained on another part of this data ({', '.join(differs)} differ): some of its training samples "
        "are test samples here, and accuracies are too high"
    )
