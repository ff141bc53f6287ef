"""The bodies of answers."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

# live: interactions since the bundle was made are part of it, behind what the bundle has or alone.
HistorySource = Literal["request", "bundle", "live", "none"]
# live: the bundle's counts and those of the interactions since. bundle: the bundle's alone; no live counts are known.
CountsSource = Literal["live", "bundle"]


class Message(BaseModel):
    """An answer or a part of one."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# unknown_item: not in the catalogue, and without a title. refused_title: the title is blank, or no text.
SkipReason = Literal["unknown_item", "refused_title"]


class HistoryReport(Message):
    """Where a history came from and what became of it."""

    source: HistorySource
    given: int = Field(description="Liked items in all.")
    used: int = Field(description="Those that stand in the prompt.")
    dropped: int = Field(description="Those before the prompt's window, over its token budget, or skipped as unknown.")
    titles_cut: int = Field(description="Titles in the prompt that the token cap shortened.")
    titles_ignored: int = Field(description="Titles sent that differ from the catalogue's, which stands.")
    titles_cleaned: int | None = Field(
        default=None, description="Titles in the prompt that were cleaned before they were read; absent if none was."
    )


# Results are plain dataclasses: a request may have a thousand, and what is made here needs no checking.
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredItem:
    """One item's score and how it came about."""

    item_id: str
    score: Annotated[
        float,
        Field(description="Calibrated probability of a click, from raw_score, collaborative vectors and counts."),
    ]
    raw_score: Annotated[float, Field(description="The language model's own probability of Yes.")]
    cold_item: Annotated[bool, Field(description="The item has no training data; its vectors come from its text.")]
    unknown_item: Annotated[
        bool, Field(description="The item is not in the catalogue; it was scored from its title alone.")
    ]
    in_history: Annotated[bool, Field(description="The item stands in the history.")]
    title_ignored: Annotated[bool, Field(description="The title sent differs from the catalogue's, which stands.")]
    title_tokens_cut: Annotated[int, Field(description="Tokens that the title's cap cut off.")]
    title: Annotated[
        str | None,
        Field(description="The title that was read, where cleaning changed the one sent; absent otherwise."),
    ] = None
    parts: Annotated[
        dict[str, float] | None,
        Field(description="With explain: what each part adds to the logit of score; their sum is the logit."),
    ] = None

    def fields(self) -> dict[str, Any]:
        """Return every field of an item alone."""
        return {name: getattr(self, name) for name in ScoredItem.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPair(ScoredItem):
    """One pair's result."""

    index: Annotated[int, Field(description="The pair's place in the request.")]
    user_id: str
    cold_user: Annotated[
        bool, Field(description="The user has no training data; their vector is folded in from the history.")
    ]
    history: HistoryReport


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedItem(ScoredItem):
    """One candidate's result."""

    rank: Annotated[int, Field(description="From 1, by score; equal scores keep the request's order.")]


class Skipped(Message):
    """Something that was left out because on_unknown is skip."""

    field: str
    item_id: str
    reason: SkipReason = "unknown_item"


class _Answer(Message):
    request_id: str
    bundle_id: str
    counts: CountsSource = Field(
        description="Which counts the scores use: live, with the interactions since the bundle, or the bundle's alone."
    )
    skipped: list[Skipped]
    timings_ms: dict[str, float] = Field(description="lookup, assemble, queue, forward and total.")


_ITEM_EXAMPLE: dict[str, JsonValue] = {
    "item_id": "i7",
    "score": 0.31,
    "raw_score": 0.44,
    "cold_item": False,
    "unknown_item": False,
    "in_history": False,
    "title_ignored": False,
    "title_tokens_cut": 0,
}
# Of a request with explain; their sum is the logit of the score above.
_PARTS_EXAMPLE: dict[str, JsonValue] = {
    "lm": -0.19,
    "collab": -0.42,
    "user_rate": 0.11,
    "item_rate": -0.2,
    "recent_likes": 0.15,
    "cold": 0.0,
    "intercept": -0.25,
}
_HISTORY_EXAMPLE: dict[str, JsonValue] = {
    "source": "bundle",
    "given": 23,
    "used": 8,
    "dropped": 15,
    "titles_cut": 0,
    "titles_ignored": 0,
}
_ANSWER_EXAMPLE: dict[str, JsonValue] = {
    "request_id": "5f1c",
    "bundle_id": "9c2e",
    "counts": "live",
    "skipped": [],
    "timings_ms": {"lookup": 0.1, "assemble": 0.6, "queue": 0.0, "forward": 21.4, "total": 22.5},
}


class ScoreResponse(_Answer):
    """Scores in the pairs' order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "results": [
                        {**_ITEM_EXAMPLE, "index": 0, "user_id": "u1", "cold_user": False, "history": _HISTORY_EXAMPLE}
                    ],
                    **_ANSWER_EXAMPLE,
                },
                {
                    "results": [
                        {
                            **_ITEM_EXAMPLE,
                            "index": 0,
                            "user_id": "u1",
                            "cold_user": False,
                            "history": _HISTORY_EXAMPLE,
                            "parts": _PARTS_EXAMPLE,
                        }
                    ],
                    **_ANSWER_EXAMPLE,
                },
            ]
        }
    )

    results: list[ScoredPair]


class RankResponse(_Answer):
    """Candidates, best first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user_id": "u1",
                    "cold_user": False,
                    "history": _HISTORY_EXAMPLE,
                    "results": [{**_ITEM_EXAMPLE, "rank": 1}],
                    **_ANSWER_EXAMPLE,
                },
                {
                    "user_id": "u1",
                    "cold_user": False,
                    "history": _HISTORY_EXAMPLE,
                    "results": [{**_ITEM_EXAMPLE, "rank": 1, "parts": _PARTS_EXAMPLE}],
                    **_ANSWER_EXAMPLE,
                },
            ]
        }
    )

    user_id: str
    cold_user: bool = Field(description="The user has no training data; their vector is folded in from the history.")
    history: HistoryReport
    results: list[RankedItem]


class InteractionsResponse(Message):
    """What became of the interactions; those accepted are on disk."""

    accepted: int
    duplicates: int = Field(description="Known already, with the same content.")
    forgotten: int = Field(description="Of users who were deleted since; they are not kept.")
    request_id: str


class DeletedResponse(Message):
    """A user is forgotten."""

    user_id: str
    deleted_at: float = Field(description="UTC seconds; what the user did until then is forgotten, later things count.")
    request_id: str


class Problem(Message):
    """What is wrong, where, and how to mend it."""

    code: str
    message: str
    field: str | None = None


class ErrorResponse(Message):
    """The one shape of every error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "code": "unknown_item",
                        "message": "item 'x' is not in the catalogue; send its title, or set on_unknown to skip",
                        "field": "candidates[3]",
                    },
                    "request_id": "5f1c",
                }
            ]
        }
    )

    error: Problem
    request_id: str


class Alive(Message):
    """The process answers."""

    status: Literal["alive"] = "alive"


class EngineReadiness(Message):
    """Where the engine stands."""

    state: str
    detail: str
    restarts: int


class StoreReadiness(Message):
    """Where the feature store stands."""

    ready: bool
    detail: str


class InteractionsReadiness(Message):
    """Whether interactions are taken. Scores go on without."""

    ready: bool
    detail: str


class RoleReadiness(Message):
    """A bundle that is served beside the current one; it does not decide whether the service is ready."""

    role: Literal["canary", "shadow"]
    bundle_id: str
    share: float
    state: str


class Ready(Message):
    """Whether a request would be scored now: all that a stranger is told."""

    ready: bool


class Readiness(Message):
    """Whether a request would be scored now, and what stands in its way."""

    ready: bool
    stopping: bool
    bundle_id: str
    engine: EngineReadiness
    store: StoreReadiness
    interactions: InteractionsReadiness
    background: list[str] = Field(description="Background tasks that died: restart the service.")
    beside: list[RoleReadiness]


class RoleState(Message):
    """A bundle that is served, and what for."""

    role: Literal["current", "canary", "shadow"]
    bundle_id: str
    merged_id: str
    folder: str
    share: float | None = Field(description="Of the users for a canary, of the requests for a shadow.")
    state: str = Field(description="Where its engine stands.")
    requests: int = Field(description="How many requests hold it now.")


class ChangeState(Message):
    """The last change of bundles, or the one that runs."""

    role: str
    bundle: str
    began: str
    step: str
    outcome: str = Field(description="running, switched or refused.")
    reason: str


class BundleState(Message):
    """Which bundles are served."""

    roles: list[RoleState]
    draining: list[str] = Field(description="Bundles that earlier requests still hold; freed after them.")
    change: ChangeState | None
