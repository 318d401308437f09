"""The page's templates, filled in: every value is escaped unless it is markup of our own."""

import base64
import hashlib
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from fleetfit.runs.report import markup
from fleetfit.runs.report.markup import Markup


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fleetfit.runs.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": markup.count, "percent": markup.percent, "bytes": markup.bytes_text}
    return environment


def fill(template: str, **values: object) -> Markup:
    """A template of this package with its values."""
    return Markup(_environment().get_template(template).render(**values))


@cache
def script(name: str) -> Markup:
    """A script of the templates' folder, to stand in the page as it is."""
    source, _, _ = PackageLoader("fleetfit.runs.report", "templates").get_source(_environment(), name)
    return Markup(source)


def script_hash(source: str) -> str:
    """How the page's content security policy names a script that may run: no other one may."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
