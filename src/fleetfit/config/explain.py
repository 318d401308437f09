"""A resolved job as TOML in which every key is explained."""

import re
from typing import get_args, get_origin

from pydantic import BaseModel

from fleetfit.config.families import FAMILIES
from fleetfit.config.job import Job
from fleetfit.config.types import Section

TEXT_KEYS = {"model.vocabulary", "model.frequent_tokens", "data.max_tokens", "data.empty_text_share"}
IMAGE_KEYS = {
    *(f"model.{key}" for key in ("shift_pixels", "flip", "cutout_pixels", "mixup", "cutmix")),
    *("data.bad_image_share", "data.class_folder", "header.views"),
}


def explained_toml(job: Job) -> str:
    """The resolved job as TOML, each key with what it is; still TOML.

    Keys that are not set are comments. Left out is what the family has no use for, unless the job sets it.
    """
    hidden = IMAGE_KEYS if FAMILIES[job.model.family].kind == "text" else TEXT_KEYS
    lines = ["# Every key of the job, as it would run."]
    section: type[BaseModel] | None = Job
    name, shown, told = "", set[str](), set[str]()

    def unset() -> list[str]:
        if section is None or name in told:
            return []
        told.add(name)
        keys = [k for k, f in section.model_fields.items() if k not in shown and not _is_section(f.annotation)]
        return [f"# {k} =  # {_hint(section, k)}" for k in keys if f"{name}.{k}".lstrip(".") not in hidden]

    for line in job.to_toml().splitlines():
        if header := re.fullmatch(r"\[+([\w.]+)\]+", line):
            spaces = [lines.pop()] if not lines[-1] else []
            lines += [*unset(), *spaces]
            name, shown = header[1], set()
            section = _section_of(name.split("."))
            title = (section.__doc__ or "").strip().splitlines()[0] if section else ""
            lines.append(f"{line}  # {title}" if title else line)
            continue
        key = re.match(r"(\w+) = ", line)
        if section and key:
            shown.add(key[1])
            if f"{name}.{key[1]}" in hidden and _is_default(job, name, key[1]):
                continue
        hint = _hint(section, key[1]) if section and key else ""
        lines.append(f"{line}  # {hint}" if hint else line)
    lines += unset()
    for field in Job.model_fields:  # of a table that has nothing but tables in it, TOML has no line
        if (section := _section_of([field])) and field not in told:
            name, shown = field, set()
            if keys := unset():
                lines += ["", f"# [{field}]", *keys]
    return "\n".join(lines) + "\n"


def _is_default(job: Job, name: str, key: str) -> bool:
    section = getattr(job, name)
    return bool(getattr(section, key) == type(section).model_fields[key].default)


def _is_section(annotation: object) -> bool:
    """Whether a key is a table of its own."""
    kinds = (annotation, *get_args(annotation), get_origin(annotation))
    return any(isinstance(kind, type) and issubclass(kind, (Section, dict)) for kind in kinds)


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
