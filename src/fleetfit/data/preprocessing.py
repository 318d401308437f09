"""How raw pixel values or texts become a model's inputs: one record, kept with every model, applied here only."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor

from fleetfit.core.hardware import moved
from fleetfit.core.records import Record

Side = Annotated[int, Field(ge=1)]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


@lru_cache(maxsize=32)
def _by_channel(numbers: tuple[float, ...], torch_device: torch.device) -> Float32[Tensor, "channel 1 1"]:
    """Made once: a GPU would otherwise be waited for at every look-up of samples."""
    return moved(torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1), torch_device)


class Preprocessing(Record):
    """(value / maximum - mean) / std, channel by channel, of images of one size; and how images get that size."""

    size: tuple[Side, Side] = Field(description="rows, columns")
    channels: Literal[1, 3] = Field(description="1: grey, 3: red, green, blue")
    maximum: float = Field(gt=0, allow_inf_nan=False, description="the largest raw value; the smallest is 0")
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]
    # The mean of the area that a pixel covers: what scikit-learn's digits were made by.
    resample: Resample = Field("box", description="filter that brings an image of another size to this one")
    resize: Side | tuple[Side, Side] | None = Field(
        None,
        description="to so many rows and columns, or the shorter side to so many, before the middle is cut out; "
        "None: straight to the size",
    )

    @model_validator(mode="after")
    def _nothing_is_cut_that_is_not_there(self) -> "Preprocessing":
        sides = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize or self.size
        if sides[0] < self.size[0] or sides[1] < self.size[1]:
            raise ValueError(f"resize must be at least the size {list(self.size)}, got {self.resize}")
        return self

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> "Preprocessing":
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name} must have one number for each of {self.channels} channels, got {len(values)}")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows, columns: one sample."""
        return (self.channels, *self.size)

    def apply(
        self, values: Shaped[np.ndarray, "sample channel row column"]
    ) -> Float32[np.ndarray, "sample channel row column"]:
        """Model inputs from raw values."""
        mean, std = (np.asarray(numbers, np.float32).reshape(-1, 1, 1) for numbers in (self.mean, self.std))
        return (values.astype(np.float32) / np.float32(self.maximum) - mean) / std

    def to_inputs(
        self, values: Shaped[Tensor, "sample channel row column"]
    ) -> Float32[Tensor, "sample channel row column"]:
        """The same of tensors, on whatever device they are."""
        mean, std = (_by_channel(numbers, values.device) for numbers in (self.mean, self.std))
        return (values.float() / self.maximum - mean) / std

    @property
    def words(self) -> str:
        """The formula for a person."""
        mean, std = (", ".join(f"{number:g}" for number in numbers) for numbers in (self.mean, self.std))
        shape = ", ".join(map(str, self.shape))
        return f"pixel values / {self.maximum:g}, minus {mean}, divided by {std}; [sample, {shape}]{self._how}"

    @property
    def _how(self) -> str:
        """How an image gets its size, where that is not the mean of the area that a pixel covers."""
        if self.resize is None:
            return "" if self.resample == "box" else f"; images are resized ({self.resample})"
        how = f"shorter side to {self.resize}" if isinstance(self.resize, int) else "to {} x {}".format(*self.resize)
        return f"; images are resized ({self.resample}, {how}) and their middle is cut out"

    def numpy_code(self, values: str) -> str:
        """The formula as an expression in Python, for one who has numpy and no fleetfit."""
        mean, std = (
            repr(numbers[0]) if self.channels == 1 else f"numpy.reshape({list(numbers)}, (-1, 1, 1))"
            for numbers in (self.mean, self.std)
        )
        return f"numpy.float32(({values} / {self.maximum!r} - {mean}) / {std})"


class TextPreprocessing(Record):
    """The numbers of a text's tokens, special ones included, cut to one length and padded on the right."""

    tokenizer: str = Field(repr=False, description="content of a tokenizer.json")
    num_tokens: Annotated[int, Field(ge=2)]
    pad_id: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _fits_its_tokenizer(self) -> "TextPreprocessing":
        tokenizer = self._cached
        if self.pad_id >= tokenizer.get_vocab_size():
            raise ValueError(f"pad_id must be < the vocabulary's {tokenizer.get_vocab_size()}, got {self.pad_id}")
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if self.num_tokens <= special:
            raise ValueError(f"num_tokens must be > the {special} special tokens of every text, got {self.num_tokens}")
        return self

    @property
    def _cached(self) -> Any:
        return _cutting_tokenizer(self.tokenizer, self.num_tokens)

    @property
    def shape(self) -> tuple[int]:
        """Tokens: one sample."""
        return (self.num_tokens,)

    def apply(self, texts: Sequence[str]) -> Int64[np.ndarray, "sample token"]:
        """Model inputs from texts."""
        numbers = np.full((len(texts), self.num_tokens), self.pad_id, np.int64)
        for row, text in zip(numbers, texts, strict=True):
            ids = self._cached.encode(text).ids
            row[: len(ids)] = ids
        return numbers

    def num_too_long(self, texts: Sequence[str]) -> int:
        """How many texts lose their end."""
        return sum(bool(self._cached.encode(text).overflowing) for text in texts)

    @property
    def words(self) -> str:
        """What is done, for a person."""
        return (
            f"numbers of the tokens that the tokenizer here cuts a text into, {self.num_tokens} at most, "
            f"padded on the right with {self.pad_id}; [sample, {self.num_tokens}]"
        )


def _form_kind(value: Any) -> str:
    fields = value if isinstance(value, dict) else value.__dict__
    return "text" if "num_tokens" in fields else "image"


# How a model's inputs are made, whatever they are; saved forms of images say no kind.
Form = Annotated[
    Annotated[Preprocessing, Tag("image")] | Annotated[TextPreprocessing, Tag("text")], Discriminator(_form_kind)
]


@lru_cache(maxsize=8)
def _cutting_tokenizer(tokenizer_json: str, num_tokens: int) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"tokenizer must be the content of a tokenizer.json: {error}") from error
    if num_tokens > tokenizer.num_special_tokens_to_add(is_pair=False):  # otherwise an error of its own, elsewhere
        tokenizer.enable_truncation(num_tokens)
    tokenizer.no_padding()
    return tokenizer
