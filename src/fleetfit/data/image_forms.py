"""How images become a model's inputs: as the pre-trained model's image processor says, else as its configuration."""

import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fleetfit.config.sections import ModelConfig
from fleetfit.core.encoding import first_problem
from fleetfit.core.records import JsonDict
from fleetfit.data.preprocessing import Preprocessing, Resample, Side
from fleetfit.models.pretrained import read_config_of

log = logging.getLogger(__name__)

FILTERS: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def image_form(model: ModelConfig) -> Preprocessing:
    """The form of a job's model. Its inputs have the size that the model was built for.

    Where an image processor gives another size, all its sizes are scaled to the model's.

    Raises:
        ValueError: the pre-trained model is not there, or its image processor cannot be read or followed.
    """
    if not model.pretrained:
        return _plain(model.config)
    source, config = read_config_of(model.pretrained, model.family)
    processor = _processor(source, f"model.pretrained = {model.pretrained!r}")
    if processor is None:
        log.info("model.pretrained = %r has no image processor: pixels become -1..1", model.pretrained)
        return _plain(config)
    try:
        return _of_processor(processor, config)
    except ValueError as error:
        why = first_problem(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"model.pretrained = {model.pretrained!r}: its image processor: {why}") from error


def image_processor(form: Preprocessing) -> JsonDict:
    """The same in the words of Transformers: the content of preprocessor_config.json."""
    numbers = {name: number for number, name in FILTERS.items()}
    resize = form.size if form.resize is None else form.resize
    sides = {"shortest_edge": resize} if isinstance(resize, int) else {"height": resize[0], "width": resize[1]}
    cut = {"do_center_crop": True, "crop_size": {"height": form.size[0], "width": form.size[1]}}
    return {
        "image_processor_type": "ViTImageProcessor" if form.resize is None else "BitImageProcessor",
        "do_convert_rgb": form.channels == 3,
        "do_resize": True,
        "size": sides,
        "resample": numbers[form.resample],
        **(cut if form.resize is not None else {}),
        "do_rescale": True,
        "rescale_factor": 1 / form.maximum,
        "do_normalize": True,
        "image_mean": list(form.mean),
        "image_std": list(form.std),
    }


def _plain(config: dict[str, Any]) -> Preprocessing:
    side, channels = config.get("image_size", 224), config.get("num_channels", 3)
    rows, columns = side if isinstance(side, (list, tuple)) else (side, side)
    half = (0.5,) * channels
    return Preprocessing(size=(rows, columns), channels=channels, maximum=255, mean=half, std=half, resample="bilinear")


def _processor(source: str, said: str) -> Any:
    """The model's image processor, the one that needs no torchvision; None if it has none."""
    from transformers import AutoImageProcessor
    from transformers.utils import logging as transformers_logging

    file = Path(source, "preprocessor_config.json")
    if Path(source).is_dir() and not file.exists():
        return None
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    except Exception as error:  # of the hub, of JSON, of Transformers
        first = str(error).strip().splitlines()[0]
        if file.exists():
            raise ValueError(f"{said}: {file} cannot be read: {first}") from error
        log.info("%s: no image processor: %s", said, first)
        return None
    finally:
        transformers_logging.set_verbosity(level)


def _of_processor(processor: Any, config: dict[str, Any]) -> Preprocessing:
    plain = _plain(config)
    resize = _sides(processor.size, "size") if processor.do_resize else None
    cut = _sides(processor.crop_size, "crop_size") if getattr(processor, "do_center_crop", False) else None
    if isinstance(cut, int):
        cut = (cut, cut)
    size = cut or resize
    if size is None:
        size = plain.size
    elif isinstance(size, int):
        raise ValueError("only the shorter side has a size, and nothing is cut out")
    if size != plain.size:
        scale = (plain.size[0] / size[0], plain.size[1] / size[1])
        if isinstance(resize, int):
            resize = max(round(resize * max(scale)), *plain.size)
        elif resize is not None:
            resize = (round(resize[0] * scale[0]), round(resize[1] * scale[1]))
        log.info("the image processor makes %s, the model takes %s: scaled to that", size, plain.size)
    mean, std = plain.mean, plain.std
    if processor.do_normalize:
        mean, std = (_numbers(n, plain.channels) for n in (processor.image_mean, processor.image_std))
    else:
        mean, std = (0.0,) * plain.channels, (1.0,) * plain.channels
    # It may divide by another number than pixels go up to: here they are always divided by 255, and the rest adapted.
    divisor = round(1 / processor.rescale_factor, 6) if processor.do_rescale else 1
    mean, std = (tuple(number * divisor / plain.maximum for number in numbers) for numbers in (mean, std))
    return Preprocessing(
        size=plain.size,
        channels=plain.channels,
        maximum=plain.maximum,
        mean=mean,
        std=std,
        resample=FILTERS[int(processor.resample)] if processor.resample is not None else "bilinear",
        resize=None if resize == plain.size else resize,
    )


def _sides(size: Any, name: str) -> Side | tuple[Side, Side] | None:
    """Rows and columns, or the shorter side's length."""
    fields = {key: value for key, value in dict(size or {}).items() if value is not None}
    if set(fields) == {"height", "width"}:
        return (int(fields["height"]), int(fields["width"]))
    if set(fields) == {"shortest_edge"}:
        return int(fields["shortest_edge"])
    raise ValueError(f"{name} must be height and width, or shortest_edge, got {fields}")


def _numbers(values: Any, channels: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in (values if isinstance(values, (list, tuple)) else [values]))
    return numbers * channels if len(numbers) == 1 else numbers
