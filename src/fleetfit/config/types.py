"""Kinds of values that a job's keys take, and what all its tables have in common."""

from typing import Annotated

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from fleetfit.core.records import Record
from fleetfit.core.units import parse_bytes, parse_seconds


def as_tuple(value: object) -> object:
    """A single value stands for a list of one."""
    return value if isinstance(value, (list, tuple)) else (value,)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[int, Field(ge=1)]
Watts = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]


class Section(Record):
    """Base of the job's tables: a number is a finite number; neither true nor '2' is one."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[str(info.field_name)]
        kind, is_read = field.annotation, any(isinstance(m, BeforeValidator) for m in field.metadata)
        if kind in (int, float) and not is_read and isinstance(value, (bool, str)):
            raise ValueError(f"must be {'an integer' if kind is int else 'a number'}")
        return value
