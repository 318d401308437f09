"""A text model's tokenizer as files beside the model, as ``AutoTokenizer`` and ``tokenizers`` read them."""

import json
from pathlib import Path
from typing import Any

from fleetfit.data.preprocessing import TextPreprocessing

TOKENIZER_FILE = "tokenizer.json"


def tokenizer_files(form: TextPreprocessing) -> dict[str, str]:
    """Contents by the file's name; Transformers has to be told the length and the padding once more."""
    from tokenizers import Tokenizer

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": form.num_tokens,
        "pad_token": Tokenizer.from_str(form.tokenizer).id_to_token(form.pad_id),
        "padding_side": "right",
        "truncation_side": "right",
    }
    if unknown := json.loads(form.tokenizer)["model"].get("unk_token"):
        config["unk_token"] = unknown
    return {TOKENIZER_FILE: form.tokenizer, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def with_tokenizer(preprocessing: Any, folder: Path) -> Any:
    """A saved form, with the tokenizer that lies beside it; of images it has none and stays as it is.

    Raises:
        ValueError: it needs one and there is none.
    """
    if not isinstance(preprocessing, dict) or "num_tokens" not in preprocessing or "tokenizer" in preprocessing:
        return preprocessing
    path = folder / TOKENIZER_FILE
    try:
        return {**preprocessing, "tokenizer": path.read_text(encoding="utf-8")}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; the model reads texts by it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is corrupt: {error}") from None
