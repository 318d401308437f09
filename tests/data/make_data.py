"""Small data of every kind of source, as users have it; what is written is returned."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fleetfit.config import Job, make_job

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
