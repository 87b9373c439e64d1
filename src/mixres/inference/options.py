"""Values from outside (options, rows, recipes) checked by a pydantic model, with its words for what is wrong."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mixres.errors import UserError

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], values: Mapping[str, Any], shown: Callable[[str], str]) -> M:
    """A `model` of the values; `shown` writes a key as messages name it.

    Raises:
        UserError: one line for every key that is missing, unknown or has a wrong value.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(list(_lines(error, shown))) from error


def options(model: type[M], given: Mapping[str, Any], **shown: str) -> M:
    """A `model` of the command line's options.

    Raises:
        UserError: as `validated`; a key is named as its option, or as `shown` has it.
    """
    return validated(model, given, lambda key: shown.get(key, f"--{key.replace('_', '-')}"))


def _lines(error: ValidationError, shown: Callable[[str], str]) -> Iterator[str]:
    for each in error.errors(include_url=False):
        key, kind = str(each["loc"][0]), each["type"]
        if kind == "missing":
            yield f"{shown(key)}: not given; write it"
        elif kind == "extra_forbidden":
            yield f"{shown(key)}: unknown; correct it, or take it out"
        elif kind == "value_error":
            yield f"{shown(key)}: {each['ctx']['error']}"
        else:
            yield f"{shown(key)}: given {each['input']}, {each['msg'].partition(' ')[2]}"
