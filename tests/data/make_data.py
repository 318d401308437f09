"""Small data of every kind of source, as users have it; what is written is returned."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fleetfit.config.job import Job, make_job

NAMES = ("cat", "dog", "owl")


def picture(number: int, side: int = 12) -> Image.Image:
    """A picture that no other number has; its colour says its class, number % 3."""
    rows, columns = np.mgrid[:side, : side + 4]
    pixels = np.zeros((side, side + 4, 3), np.uint8)
    pixels[..., number % 3] = 120 + 2 * rows + number % 90
    pixels[..., (number + 1) % 3] = (columns * (number + 3)) % 60
    return Image.fromarray(pixels)


def encoded(number: int, side: int = 12) -> bytes:
    """The same as a PNG."""
    file = io.BytesIO()
    picture(number, side).save(file, "png")
    return file.getvalue()


def image_rows(number: int, start: int = 0) -> dict[str, list[Any]]:
    """Columns of images and labels; images are numbered from ``start``."""
    numbers = range(start, start + number)
    return {"image": [{"bytes": encoded(i), "path": None} for i in numbers], "label": [i % 3 for i in numbers]}


def image_features() -> Any:
    """What the columns of ``image_rows`` are."""
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    return Features({"image": ImageFeature(), "label": ClassLabel(names=list(NAMES))})


def image_table(number: int, start: int = 0) -> Any:
    """A ``datasets.Dataset`` of images."""
    from datasets import Dataset

    return Dataset.from_dict(image_rows(number, start), features=image_features())


def image_folder(folder: Path, number: int, split: str = "train") -> None:
    """<split>/<class>/<number>.png."""
    for i in range(number):
        path = folder / split / NAMES[i % 3] / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))


def image_job(source: str | Path, cache: Path, **data: Any) -> Job:
    """A job whose model takes 3 x 8 x 8."""
    return make_job(
        {
            "model": {"config": {"image_size": 8, "num_channels": 3}},
            "data": {"source": str(source), **data},
            "run": {"cache": str(cache)},
        }
    )


INTENTS = ("balance", "card_lost", "top_up", "transfer")
PHRASES = {
    "balance": ("how much is on my account", "what is my balance", "is my balance wrong"),
    "card_lost": ("my card is gone", "I lost my card", "somebody stole my card"),
    "top_up": ("I want to top up", "can I top up by cash", "why did my top up fail"),
    "transfer": ("send money to my friend", "how long does a transfer take", "please cancel the transfer"),
}
ENDINGS = ("", " please", " today", " in the app", ", can you help me with that", "?", " since last week", " now")


def text_rows(number: int) -> dict[str, list[Any]]:
    """Columns of texts and their intents; no text is there twice among the first 96."""
    intents = [INTENTS[i % 4] for i in range(number)]
    texts = [PHRASES[name][i // 4 % 3] + ENDINGS[i // 12 % 8] for i, name in enumerate(intents)]
    return {"text": texts, "intent": intents}


def text_table(number: int) -> Any:
    """A ``datasets.Dataset`` of texts."""
    from datasets import Dataset

    return Dataset.from_dict(text_rows(number))


def text_csv(path: Path, number: int) -> Path:
    """The same as a table of values between commas."""
    text_table(number).to_csv(str(path))
    return path


def text_fields(source: str | Path, cache: Path, family: str = "bert", **data: Any) -> dict[str, Any]:
    """A job of a small text model."""
    small: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 20 if family == "roberta" else 18}
    if family == "distilbert":
        small |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    else:
        small |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return {
        "model": {"family": family, "config": small},
        "data": {"source": str(source), **data},
        "run": {"cache": str(cache)},
    }
