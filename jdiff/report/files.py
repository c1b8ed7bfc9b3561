"""What all report pages share: the templates' environment, and the file written."""

import os
import pathlib
from typing import Any

from jdiff.errors import UserError

_HERE = pathlib.Path(__file__).parent


def page(template: str, styles: tuple[str, ...], scripts: tuple[str, ...], **values: Any) -> str:
    """A template of this folder, filled with `values`, its styles and its scripts."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    joined = lambda names: markupsafe.Markup("".join((_HERE / name).read_text() for name in names))
    return environment.get_template(template).render(
        style=joined(styles), script=joined(scripts), **values
    )


def svg(charts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts whose SVG is to stand in the page as it is."""
    import markupsafe

    return [{**chart, "svg": markupsafe.Markup(chart["svg"])} for chart in charts]


def save(path: pathlib.Path, text: str) -> pathlib.Path:
    """Writes a file at once or not at all; returns its path.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return path
