"""A resolved job as TOML in which every key is explained."""

import re
from typing import get_args

from pydantic import BaseModel

from fleetfit.config import Job


def explained_toml(job: Job) -> str:
    """The resolved job as TOML, each key with what it is; still TOML."""
    lines = ["# Every key of the job, as it would run."]
    section: type[BaseModel] | None = Job
    for line in job.to_toml().splitlines():
        if header := re.fullmatch(r"\[+([\w.]+)\]+", line):
            section = _section_of(header[1].split("."))
            title = (section.__doc__ or "").strip().splitlines()[0] if section else ""
            lines.append(f"{line}  # {title}" if title else line)
            continue
        key = re.match(r"(\w+) = ", line)
        hint = _hint(section, key[1]) if section and key else ""
        lines.append(f"{line}  # {hint}" if hint else line)
    return "\n".join(lines) + "\n"


def _section_of(path: list[str]) -> type[BaseModel] | None:
    """The model behind a TOML section; None for free-form ones."""
    model: type[BaseModel] = Job
    for part in path:
        annotation = model.model_fields[part].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not inner:
            return None
        model = inner[0]
    return model


def _hint(section: type[BaseModel], key: str) -> str:
    """A key's description and, where there are only some, its values."""
    field = section.model_fields[key]
    values = [v for a in (field.annotation, *get_args(field.annotation)) for v in get_args(a) or (a,)]
    names = list(dict.fromkeys(v for v in values if isinstance(v, str)))
    text = field.description or ""
    if len(names) > 1:
        text = f"{' | '.join(names)}{'; ' if text else ''}{text}"
    return text.replace("\n", " ")
