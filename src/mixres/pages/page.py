"""HTML pages that stand alone: the template and the style that all of them share, and images inside them.

Promise: texts are escaped; a page asks no network for anything.
"""

import base64
from collections.abc import Callable
from io import BytesIO
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template, select_autoescape
from PIL import Image


def template(package: str, name: str, **filters: Callable[..., Any]) -> Template:
    """The template `name` of `package`, which may extend `base.html.j2`; values in `*.html.j2` are escaped."""
    loader = ChoiceLoader([PackageLoader(package, ""), PackageLoader("mixres.pages", "")])
    escape = select_autoescape(["html.j2"])
    environment = Environment(loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= filters
    return environment.get_template(name)


def webp(image: Image.Image, max_side: int, *, quality: int, exact: int = 0, method: int = 4) -> bytes:
    """The image at no more than `max_side` pixels a side; one of at most `exact` pixels without any loss.

    `method` is WebP's effort, from 0, fast, to 6.
    """
    image = image.copy()
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = BytesIO()
    image.save(file, format="WEBP", quality=quality, method=method, lossless=image.width * image.height <= exact)
    return file.getvalue()


def data_uri(encoded: bytes, kind: str = "webp") -> str:
    """The address of an encoded image that stands in the page itself."""
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
