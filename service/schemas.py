"""The bodies of requests. What a body may hold is decided here; how much of it, by the settings."""

import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    StrictInt,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from models.ids import MAX_ID_LENGTH, canonical_id
from service.settings import Settings

# Seconds of the years 1 to 9999, as in data folders.
EARLIEST = datetime(1, 1, 1, tzinfo=UTC).timestamp()
MAX_TIMESTAMP = 64  # characters
LATEST = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


def _id(value: object) -> str:
    # The type first: an error message must not spell out a megabyte of nested lists.
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise PydanticCustomError(
            "id_type", "an id is a string or an integer; this is a {kind}", {"kind": _kind(value)}
        )
    return canonical_id(value)


def _at_most(value: object, limit: int) -> None:
    """Refuse a list that is too long before any entry of it is looked at."""
    if isinstance(value, list) and len(value) > limit:
        raise PydanticCustomError(
            "limit_exceeded", "{length} entries; send at most {limit}", {"length": len(value), "limit": limit}
        )


def _bounded(limit: str) -> BeforeValidator:
    """Return the check of a list's length against the setting of this name. Settings are the validation's context."""

    def check(value: object, info: ValidationInfo) -> object:
        if isinstance(info.context, Settings):
            _at_most(value, getattr(info.context, limit))
        return value

    return BeforeValidator(check)


def _histories(value: object, info: ValidationInfo) -> object:
    """Check all histories of a /score request together."""
    if isinstance(info.context, Settings) and isinstance(value, list):
        _at_most(value, info.context.max_pairs)
        histories = [one.get("history") for one in value if isinstance(one, dict)]
        entries, limit = sum(len(one) for one in histories if isinstance(one, list)), info.context.max_histories
        if entries > limit:
            raise PydanticCustomError(
                "limit_exceeded",
                "{entries} entries of histories in all; send at most {limit} a request",
                {"entries": entries, "limit": limit},
            )
    return value


def _short_title(value: object, info: ValidationInfo) -> object:
    limit = info.context.max_title if isinstance(info.context, Settings) else None
    if limit is not None and isinstance(value, str) and len(value) > limit:
        raise PydanticCustomError(
            "limit_exceeded",
            "a title of {length} characters; send at most {limit}",
            {"length": len(value), "limit": limit},
        )
    return value


def _label(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise PydanticCustomError("label", "a label is true, false, 1, 0 or null")


def _no_boolean(value: object) -> object:
    if isinstance(value, (bool, str)):
        raise PydanticCustomError("number", "give a number; this is a {kind}", {"kind": _kind(value)})
    return value


def _timestamp(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or len(str(value)) > MAX_TIMESTAMP:
        raise PydanticCustomError(
            "timestamp_type", "a timestamp is a number or ISO 8601 text; this is a {kind}", {"kind": _kind(value)}
        )
    if _is_date(value):
        raise PydanticCustomError(
            "timestamp_date",
            "a timestamp of {value} would be a second of 1970; send ISO 8601 with dashes, or UTC seconds",
            {"value": str(value)},
        )
    try:
        seconds = _seconds(value)
    except (ValueError, OverflowError):
        seconds = math.nan
    if not EARLIEST <= seconds <= LATEST:
        raise PydanticCustomError(
            "timestamp",
            "a timestamp is UTC seconds (not milliseconds) or ISO 8601, as in 1700000000 or 2023-11-14T22:13:20Z",
        )
    return seconds


def _is_date(value: str | float) -> bool:
    """Return whether a timestamp is a date or a year written as a number, as 20171130 or 2017."""
    if not isinstance(value, str):
        value = str(value)[:16].removesuffix(".0")
    if not re.fullmatch(r"(19|20)\d\d(\d{4})?", value.strip()[:16], re.ASCII):
        return False
    return len(value.strip()) == 4 or ("01" <= value.strip()[4:6] <= "12" and "01" <= value.strip()[6:] <= "31")


def _seconds(value: str | float) -> float:
    try:
        return float(value)
    except ValueError:
        moment = datetime.fromisoformat(str(value))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _kind(value: object) -> str:
    names = {bool: "boolean", str: "text", float: "fraction", list: "list", dict: "object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


_ID_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}, {"type": "integer"}],
    "description": 'String or integer; 7 and "7" are the same id, "007" is another.',
}

_SPARE = 64  # values of a body beside its lists, and some more

Share = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=1, allow_inf_nan=False)]
Id = Annotated[str, BeforeValidator(_id), WithJsonSchema(_ID_SCHEMA)]
# Read by `service.questions.read_title`, which knows what to do with a refused one.
Title = Annotated[str, BeforeValidator(_short_title)]
OnUnknown = Literal["error", "skip"]
Label = Annotated[
    bool | None,
    BeforeValidator(_label),
    WithJsonSchema(
        {
            "anyOf": [{"type": "boolean"}, {"type": "integer", "enum": [0, 1]}, {"type": "null"}],
            "description": "What came of it; null or absent while nothing is known.",
        }
    ),
]
Timestamp = Annotated[
    float,
    BeforeValidator(_timestamp),
    WithJsonSchema(
        {
            "anyOf": [{"type": "number"}, {"type": "string", "minLength": 1, "maxLength": MAX_TIMESTAMP}],
            "description": "When, by the client: UTC seconds since 1970, or ISO 8601; without a zone it is UTC.",
        }
    ),
]


class _Part(BaseModel):
    """An object of a body. One of more keys than it has fields is one error, not one for each key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            raise PydanticCustomError(
                "keys",
                "{keys} keys; the fields are {fields}",
                {"keys": len(value), "fields": ", ".join(cls.model_fields)},
            )
        return value


class RequestBody(_Part):
    """A whole body."""

    @classmethod
    def most_values(cls, settings: Settings) -> int:
        """Return how many values the longest body within the limits has, at most: commas, and opening brackets."""
        raise NotImplementedError


class ItemRef(_Part):
    """An item as a client names it: its id alone, or with a title in case the bundle does not know it."""

    item_id: Id
    title: Title | None = Field(
        default=None, description="Used for items outside the catalogue; for others the catalogue's title stands."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_bare_id(cls, value: object) -> object:
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return {"item_id": value}
        if not isinstance(value, (dict, ItemRef)):
            raise PydanticCustomError(
                "item_type",
                "give an item id, or an object of item_id and title; this is a {kind}",
                {"kind": _kind(value)},
            )
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        whole = dict(schema)
        schema.clear()
        schema.update(title="ItemRef", description=cls.__doc__, anyOf=[*_ID_SCHEMA["anyOf"], whole])
        return schema


_HISTORY = Field(
    default=None,
    description="All liked items that the client knows of, oldest first, not only the last few: where the prompt's"
    " window begins depends on their number. Absent or null: the history stored in the bundle. An empty list: none.",
)


# Checked to the first error: each further one would cost time and tell little.
History = Annotated[list[ItemRef], Field(fail_fast=True), _bounded("max_history")]

_EXPLAIN = Field(
    default=False, description="true: each result has parts: what each part adds to the logit of its score."
)


class Pair(_Part):
    """A user and the one item to score for them."""

    user_id: Id
    item_id: Id
    history: History | None = _HISTORY
    title: Title | None = Field(default=None, description="The item's title, in case the bundle does not know it.")


class ScoreRequest(RequestBody):
    """Pairs to score, each for itself."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "pairs": [
                        {"user_id": "u1", "item_id": "i7"},
                        {"user_id": 42, "item_id": "i8", "history": ["i1", "i2"]},
                    ]
                },
                {"pairs": [{"user_id": "u1", "item_id": "i7"}], "explain": True},
            ]
        }
    )

    pairs: Annotated[list[Pair], Field(fail_fast=True), BeforeValidator(_histories)] = Field(min_length=1)
    on_unknown: OnUnknown = Field(
        default="error", description="What to do with an item that is not in the catalogue and has no title."
    )
    explain: StrictBool = _EXPLAIN

    @classmethod
    def most_values(cls, settings: Settings) -> int:
        """A pair has five fields, an entry of a history two; each history is a list of its own."""
        return _SPARE + 6 * settings.max_pairs + 2 * settings.max_histories


class RankRequest(RequestBody):
    """Candidates to rank for one user."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user_id": "u1",
                    "candidates": ["i7", 8, {"item_id": "new-1", "title": "A title nobody has seen"}],
                    "top_k": 10,
                },
                {"user_id": "u1", "candidates": ["i7", "i8"], "explain": True},
            ]
        }
    )

    user_id: Id
    candidates: Annotated[list[ItemRef], Field(fail_fast=True), _bounded("max_candidates")] = Field(
        min_length=1, description="Each item once."
    )
    history: History | None = _HISTORY
    top_k: StrictInt | None = Field(default=None, ge=1, description="How many results to return; all if absent.")
    on_unknown: OnUnknown = Field(
        default="error", description="What to do with an item that is not in the catalogue and has no title."
    )
    explain: StrictBool = _EXPLAIN

    @classmethod
    def most_values(cls, settings: Settings) -> int:
        """A candidate and an entry of the history have two fields each."""
        return _SPARE + 2 * (settings.max_candidates + settings.max_history)


class InteractionEvent(_Part):
    """An item was shown to a user, or what came of it, or both."""

    event_id: Id = Field(description="The event's own; sent again with the same content it counts once.")
    user_id: Id
    item_id: Id
    label: Label = None
    timestamp: Timestamp
    request_id: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._:-]{1,64}$",
        description="The request_id of the answer that showed the item: what an impression and its outcome share.",
    )
    position: StrictInt | None = Field(
        default=None, ge=0, le=1_000_000, description="Its place there: `index` of /score, `rank` of /rank."
    )


class InteractionsRequest(RequestBody):
    """Interactions, taken all together or not at all."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "interactions": [
                        {
                            "event_id": "e1",
                            "user_id": "u1",
                            "item_id": "i7",
                            "timestamp": 1700000000,
                            "request_id": "5f1c",
                            "position": 1,
                        },
                        {
                            "event_id": "e2",
                            "user_id": "u1",
                            "item_id": "i7",
                            "label": True,
                            "timestamp": "2023-11-14T22:13:29Z",
                            "request_id": "5f1c",
                            "position": 1,
                        },
                    ]
                }
            ]
        }
    )

    interactions: Annotated[list[InteractionEvent], Field(fail_fast=True), _bounded("max_interactions")] = Field(
        min_length=1
    )

    @classmethod
    def most_values(cls, settings: Settings) -> int:
        """Each has seven fields."""
        return _SPARE + 7 * settings.max_interactions


class BundleRequest(RequestBody):
    """A bundle to serve, and what for."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"bundle": "2026-11", "role": "canary", "share": 0.05}]},
    )

    bundle: str = Field(
        min_length=1, max_length=4096, description="Its folder, relative to the server's bundle folder, or absolute."
    )
    role: Literal["current", "canary", "shadow"] = "current"
    share: Share | None = Field(
        default=None, description="Of the users for a canary, of the requests for a shadow; the current one has none."
    )
    wait: StrictBool = Field(default=True, description="false: answer 202 at once; GET tells how it ends.")

    @classmethod
    def most_values(cls, settings: Settings) -> int:
        """It has four fields."""
        return _SPARE

    @model_validator(mode="after")
    def _no_null(self) -> "BundleRequest":
        if "\0" in self.bundle:
            raise PydanticCustomError("path", "a path holds no null character")
        return self
