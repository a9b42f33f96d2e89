"""The templates of the pages, each filled to one HTML file that needs nothing but itself."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import jinja2
from markupsafe import Markup

from eightgig.core.units import format_bytes, format_duration
from eightgig.report.wording import (
    format_count,
    format_method,
    format_moment,
    format_number,
    format_share,
)


@cache
def page_template(name: str) -> jinja2.Template:
    """The template `name`, with everything that is put into it escaped unless it is SVG or CSS of our own."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_package_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=format_bytes,
        count=format_count,
        duration=format_duration,
        method=format_method,
        moment=format_moment,
        number=format_number,
        share=format_share,
    )
    environment.globals.update(style=Markup(_package_text("style.css")), svg=Markup)
    return environment.get_template(name)


def _package_text(name: str) -> str:
    """The text of a file that lies beside this module."""
    return (files("eightgig.report") / name).read_text(encoding="utf-8")
