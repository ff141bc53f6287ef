"""Writes the reference of the configuration, docs/configuration.md, from the configuration's models."""

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from training.config import Config

HEAD = """# The configuration

Every key of the JSON file that `--config` takes. A file changes the keys that it names and no others, at any depth:
`{"adapt": {"schedule": {"epochs": 2}}}` keeps stage 1's learning rate. An unknown key is refused.
`sella-train configuration` writes this page.

| key | default | may be | what it is |
| --- | --- | --- | --- |
"""
LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def configuration_reference() -> str:
    """Return docs/configuration.md."""
    rows = (
        f"| `{key}` | `{json.dumps(value)}` | {_may_be(field)} | {_cell(field.description or '')} |\n"
        for key, value, field in configuration_keys(Config())
    )
    return HEAD + "".join(rows)


def configuration_keys(model: BaseModel, above: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """Yield every key with its default and its field; a key inside a part is the part's name, a dot and its name."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from configuration_keys(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value, field


def _may_be(field: FieldInfo) -> str:
    kind = field.annotation
    choices = [f"`{json.dumps(one)}`" for one in get_args(kind) if isinstance(one, str)]
    limits = [
        f"{words} {getattr(limit, name)}"
        for limit in field.metadata
        for name, words in LIMITS.items()
        if getattr(limit, name, None) is not None
    ]
    lengths = [f"at most {limit.max_length} characters" for limit in field.metadata if hasattr(limit, "max_length")]
    kinds = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    named = " or ".join(choices) if choices else kinds.get(kind, str(kind)) if isinstance(kind, type) else str(kind)
    return _cell(", ".join((named, *limits, *lengths)))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
