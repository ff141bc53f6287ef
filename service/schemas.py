"""The bodies of requests. What a body may hold is decided here; how much of it, by the settings."""

import math
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
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from models.ids import MAX_ID_LENGTH, canonical_id

# Seconds of the years 1 to 9999, as in data folders.
EARLIEST = datetime(1, 1, 1, tzinfo=UTC).timestamp()
LATEST = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


def _id(value: object) -> str:
    # The type first: an error message must not spell out a megabyte of nested lists.
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise PydanticCustomError(
            "id_type", "an id is a string or an integer; this is a {kind}", {"kind": _kind(value)}
        )
    return canonical_id(value)


def _label(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise PydanticCustomError("label", "a label is true, false, 1, 0 or null")


def _timestamp(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise PydanticCustomError(
            "timestamp_type", "a timestamp is a number or ISO 8601 text; this is a {kind}", {"kind": _kind(value)}
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


def _seconds(value: str | float) -> float:
    try:
        return float(value)
    except ValueError:
        moment = datetime.fromisoformat(str(value))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _kind(value: object) -> str:
    names = {bool: "boolean", float: "fraction", list: "list", dict: "object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


_ID_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}, {"type": "integer"}],
    "description": 'String or integer; 7 and "7" are the same id, "007" is another.',
}

Share = Annotated[float, Field(gt=0, le=1, strict=False, allow_inf_nan=False)]
Id = Annotated[str, BeforeValidator(_id), WithJsonSchema(_ID_SCHEMA)]
Title = str  # read by `service.questions.read_title`, which knows what to do with a refused one
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
            "anyOf": [{"type": "number"}, {"type": "string", "minLength": 1, "maxLength": 64}],
            "description": "When, by the client: UTC seconds since 1970, or ISO 8601; without a zone it is UTC.",
        }
    ),
]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ItemRef(_Body):
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


_EXPLAIN = Field(
    default=False, description="true: each result has parts: what each part adds to the logit of its score."
)


class Pair(_Body):
    """A user and the one item to score for them."""

    user_id: Id
    item_id: Id
    history: list[ItemRef] | None = _HISTORY
    title: Title | None = Field(default=None, description="The item's title, in case the bundle does not know it.")


class ScoreRequest(_Body):
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

    pairs: list[Pair] = Field(min_length=1)
    on_unknown: OnUnknown = Field(
        default="error", description="What to do with an item that is not in the catalogue and has no title."
    )
    explain: StrictBool = _EXPLAIN


class RankRequest(_Body):
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
    candidates: list[ItemRef] = Field(min_length=1, description="Each item once.")
    history: list[ItemRef] | None = _HISTORY
    top_k: StrictInt | None = Field(default=None, ge=1, description="How many results to return; all if absent.")
    on_unknown: OnUnknown = Field(
        default="error", description="What to do with an item that is not in the catalogue and has no title."
    )
    explain: StrictBool = _EXPLAIN


class InteractionEvent(_Body):
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


class InteractionsRequest(_Body):
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

    interactions: list[InteractionEvent] = Field(min_length=1)


class BundleRequest(BaseModel):
    """A bundle to serve, and what for."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"bundle": "2026-11", "role": "canary", "share": 0.05}]},
    )

    bundle: str = Field(
        min_length=1, max_length=4096, description="Its folder, relative to the server's bundle folder, or absolute."
    )
    role: Literal["current", "canary", "shadow"] = "current"
    share: Share | None = Field(
        default=None, description="Of the users for a canary, of the requests for a shadow; the current one has none."
    )
    wait: bool = Field(default=True, description="false: answer 202 at once; GET tells how it ends.")

    @model_validator(mode="after")
    def _no_null(self) -> "BundleRequest":
        if "\0" in self.bundle:
            raise PydanticCustomError("path", "a path holds no null character")
        return self
