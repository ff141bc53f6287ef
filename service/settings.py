"""Every setting of the service. The environment is read here and nowhere else."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.features.client import check_url
from service.features.keys import DEFAULT_PREFIX, KEY_PREFIX

PREFIX = "SELLA_"
EMBEDDED = "embedded"
DAY_S = 86_400.0


class SettingsError(ValueError):
    """Settings that cannot be used; one line a problem, each with the setting's name."""


class Settings(BaseSettings):
    """What the service depends on, frozen. Each field is also an environment variable, `SELLA_` and its name."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX, allow_inf_nan=False)

    bundle: Path = Field(description="The bundle's folder. No default: there is nothing to serve without one.")
    store: str = Field(
        default="embedded",
        description="Where users and items are looked up: embedded, the bundle's own tables, needs no server; or the"
        " address of a Redis (redis://, rediss://, unix://) that bundles were published to.",
    )
    redis_prefix: str = Field(
        default=DEFAULT_PREFIX,
        pattern=f"^{KEY_PREFIX}$",
        description="What every key in Redis begins with. One prefix for each fleet: servers that share a prefix and a"
        " database share the bundle to be served, users, items and interactions.",
    )
    redis_timeout_ms: float = Field(
        default=100.0,
        gt=0,
        le=60_000,
        description="How long a look-up waits for Redis before the embedded tables answer. Several times what a"
        " thousand candidates take, and far under any deadline.",
    )
    item_cache_mb: int = Field(
        default=256,
        ge=0,
        le=16_777_216,
        description="Megabytes of this process for items that Redis answered before, whole; about 16,000 of Qwen2-7B,"
        " 60,000 of Qwen2-0.5B. 0 keeps none.",
    )
    pointer_s: float = Field(
        default=5.0,
        gt=0,
        le=DAY_S,
        description="How often Redis is asked which bundle is to be current: seconds, where loading takes longer.",
    )
    bundle_folder: Path | None = Field(
        default=None,
        description="The folder out of which bundles may be loaded while the service runs. Unset: the one that holds"
        " the first bundle, so that nobody with an admin key reads elsewhere.",
    )
    shadow_share: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Share of the requests that a shadow bundle scores too, where its request names none. A tenth tells"
        " how scores differ within minutes and leaves the cores to the answers.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. Loopback: any other is refused without a file of keys.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="A second port, with /metrics, /docs, /openapi.json and the details of /readyz without a key, and"
        " nothing else; for Prometheus, and not for clients. 0 takes a free one. Unset: they are on the port itself,"
        " for whoever has a key.",
    )
    metrics_host: str | None = Field(
        default=None, min_length=1, description="Address of the metrics port. Unset: the same as the other port's."
    )
    engine: Literal["packed", "vllm"] = Field(
        default="packed",
        description="What computes the scores. packed runs everywhere and computes a request's shared part once.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where the language model runs. auto: the first GPU if there is one, else the CPU.",
    )
    engine_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of the engine. Unset leaves it to torch, which takes one for each physical core.",
    )
    dtype: Literal["float32", "bfloat16", "fp8"] | None = Field(
        default=None,
        description="Number type of the packed engine's weights. Unset: the bundle's own, in which its figures were"
        " measured. fp8 computes products in 8 bits; `sella-train precision` tells what either changes.",
    )
    compiled: bool = Field(
        default=False,
        description="Compile norms and MLPs of the packed engine while it loads. Off: on a CPU it gains nothing and"
        " takes a C++ compiler; on a GPU measure it by `make bench-gpu`.",
    )
    batch_tokens: int = Field(
        default=2048,
        ge=64,
        le=100_000_000,
        description="Tokens of one batch, and so the longest that a short request waits behind a long one. A hundred"
        " candidates of ML-1M fit in one, and a batch of this size keeps a device's matrix units busy.",
    )
    cache_mb: int = Field(
        default=1024,
        ge=0,
        le=16_777_216,
        description="Megabytes, on the engine's device, for keys and values of instructions and user segments. 1,024"
        " hold about 250 users of Qwen2-0.5B, 50 of Qwen2-7B; 0 keeps none.",
    )
    cache: Path | None = Field(
        default=None,
        description="Cache folder whose subfolder `backbones` holds the language models that `sella-train` converted;"
        " `models.sources` reads it. Unset: `sella` in XDG_CACHE_HOME or in ~/.cache.",
    )
    batch_ahead_ms: float = Field(
        default=20.0,
        ge=0,
        le=1000,
        description="How long before the engine is expected to be free its next batch is closed and sent. Until then it"
        " takes more requests. More than the crossing to the worker takes, because the end is an estimate.",
    )
    batches_in_flight: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Batches handed to the engine at once. Two: one computes while the next crosses to the worker.",
    )
    queue_tokens: int = Field(
        default=131_072,
        ge=64,
        le=1_000_000_000,
        description="Tokens that may wait, whatever the deadlines: several requests of a thousand candidates. What"
        " could not be scored in time is refused before that. An empty queue takes any one request.",
    )
    default_timeout_ms: int = Field(
        default=30_000,
        ge=1,
        le=600_000,
        description="Deadline of a request that names none. Generous, because a CPU needs seconds for a long list.",
    )
    forward_limit_s: float = Field(
        default=60.0,
        gt=0,
        le=DAY_S,
        description="A batch that takes longer is taken for hung, and the worker is killed. Twice the default deadline:"
        " nobody waits for such a batch any more. Raise it for a large model on a CPU.",
    )
    load_limit_s: float = Field(
        default=1800.0,
        gt=0,
        le=DAY_S,
        description="A worker that is not ready by then is killed. Long, because a backbone may have to be downloaded.",
    )
    drain_s: float = Field(
        default=30.0,
        ge=0,
        le=DAY_S,
        description="How long running requests may finish after SIGTERM; the default deadline, so that none is cut.",
    )
    vllm_weights: Path = Field(
        default=Path("~/.cache/sella/merged"),
        description="Where merged weights are kept for vLLM, a folder for each model. A cache: they can be made anew.",
    )
    tensor_parallel: int = Field(
        default=1, ge=1, le=1024, description="GPUs that vLLM spreads one model over; one, where the model fits."
    )
    data_parallel: int = Field(
        default=1, ge=1, le=1024, description="Copies of the model among which vLLM shares out prompts."
    )
    vllm_gpu_memory: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="Share of a GPU's memory that vLLM takes; the rest is for the model that distils titles beside it.",
    )
    vllm_kv_gib: float | None = Field(
        default=None,
        gt=0,
        le=65536,
        description="GiB of vLLM's key/value cache. Unset leaves it to vLLM, which fills its share. Set it on a CPU.",
    )
    vllm_eager: bool = Field(
        default=False, description="Start vLLM without compiling the model: sooner ready, slower afterwards."
    )
    max_pairs: int = Field(default=1000, ge=1, le=1_000_000, description="Pairs of one /score request.")
    max_candidates: int = Field(default=1000, ge=1, le=1_000_000, description="Candidates of one /rank request.")
    max_history: int = Field(
        default=1000,
        ge=0,
        le=1_000_000,
        description="Entries of one history. Far over the prompt's window: clients may send all they know.",
    )
    max_histories: int = Field(
        default=20_000,
        ge=0,
        le=10_000_000,
        description="Entries of all histories of one /score request together: a thousand pairs with twenty each, twenty"
        " with a thousand. More is half a second of work and more before the first token.",
    )
    max_title: int = Field(
        default=512,
        ge=1,
        le=1_000_000,
        description="Characters of one title; about four times what the prompt's title cap keeps.",
    )
    max_body: int = Field(
        default=1_048_576,
        ge=1024,
        le=1_073_741_824,
        description="Bytes of one body; 1,000 candidates with long titles fit in it.",
    )
    interactions: Path | None = Field(
        default=None,
        description="The log of interactions, an SQLite file that one server writes. Unset: interactions.sqlite beside"
        " the bundle's folder, so that it outlives a bundle.",
    )
    require_deletions: bool = Field(
        default=True,
        description="With Redis: score nobody while a log that has never heard of the deletions at other servers cannot"
        " ask Redis for them, because the bundle may hold users who were deleted. false scores them by the bundle.",
    )
    attribution_s: float = Field(
        default=3600.0,
        gt=0,
        le=30 * DAY_S,
        description="How long an impression waits for its outcome before it counts as a negative. An hour: a click"
        " comes within the visit that showed the item, and visits seldom last longer.",
    )
    retention_days: float = Field(
        default=90.0,
        gt=0,
        le=3650,
        description="How long interactions are kept after they came, whenever they happened, and so how long a repeated"
        " event id is known for one. A quarter: a bundle trained at least monthly has all that it could learn from.",
    )
    max_interactions: int = Field(
        default=1000,
        ge=1,
        le=1_000_000,
        description="Interactions of one request; as many as a /score request has pairs.",
    )
    drift_window: int = Field(
        default=10_000,
        ge=1000,
        le=10_000_000,
        description="Latest values of each kind that drift is told from. Fewer swing with single users' lists, more"
        " are slow to show a change; ten thousand are some hundred lists.",
    )
    quality_window: int = Field(
        default=10_000,
        ge=100,
        le=1_000_000,
        description="Latest labelled scores that live AUC, log-loss and calibration are of: the AUC of ten thousand is"
        " known to about 0.01, and takes about a millisecond.",
    )
    quality_scores: int = Field(
        default=200_000,
        ge=1000,
        le=100_000_000,
        description="Served scores kept in memory to be labelled, about 100 bytes each: 20 MB, or two thousand lists"
        " of a hundred.",
    )
    quality_age_s: float = Field(
        default=DAY_S,
        gt=0,
        le=3650 * DAY_S,
        description="Seconds after which a served score is not labelled any more; longer than outcomes take to come.",
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File of API keys, a line each: name:key or name:key:requests_per_second. Read again when it"
        " changes. Unset: no key is asked for, on a loopback address alone.",
    )
    admin_keys_file: Path | None = Field(
        default=None,
        description="File of admin keys, of the same form. Unset: administration is open on a loopback address without"
        " API keys, and closed otherwise.",
    )
    allow_anonymous: bool = Field(
        default=False,
        description="Serve others than this machine without API keys. Only where something in front checks callers.",
    )
    rate_limit: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Requests a second of each key, or of each address where no key is asked for; a key's own in its"
        " file goes first. Unset: none, because the queue already refuses what it cannot score in time.",
    )
    rate_burst_s: float = Field(
        default=2.0,
        gt=0,
        le=3600,
        description="Seconds' worth of requests that a client may send at once after a pause; at least one request.",
    )
    max_connections: int = Field(
        default=4096,
        ge=8,
        le=1_000_000,
        description="Open connections; fewer if the process may not open as many files. Beyond it the one that"
        " has waited longest for its client gives way; where all are at work, the new one is told 503.",
    )
    head_timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=DAY_S,
        description="How long a client may take to send a request's head. A real one sends it in one packet.",
    )
    body_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=DAY_S,
        description="How long a client may take to send a body: the longest allowed one at 35 kB a second.",
    )
    write_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=DAY_S,
        description="How long a client may leave its answer unread before the connection is cut off.",
    )
    keep_alive_s: float = Field(
        default=75.0,
        gt=0,
        le=DAY_S,
        description="How long a connection may be idle between requests. Longer than the 60 s that proxies usually keep"
        " theirs, so that none sends on a connection that closes at that moment.",
    )
    tracing: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]+(/\S*)?$",
        description="Address that OpenTelemetry spans are sent to by OTLP over HTTP, as"
        " http://collector:4318/v1/traces. Unset: none are made, and OpenTelemetry is not imported.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="info logs one line a scored request, without titles or user ids."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: readable lines on a terminal, JSON lines anywhere else."
    )

    @model_validator(mode="after")
    def _attribution_within_retention(self) -> Self:
        if self.attribution_s > self.retention_days * DAY_S:
            raise ValueError("attribution_s is longer than retention_days; an impression must outlive its window")
        return self

    @property
    def interactions_file(self) -> Path:
        """Where the log of interactions is."""
        return self.interactions or self.bundle.absolute().parent / "interactions.sqlite"

    @field_validator("vllm_weights", "api_keys_file", "admin_keys_file")
    @classmethod
    def _home_folder(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @field_validator("store")
    @classmethod
    def _store_address(cls, value: str) -> str:
        return value if value == EMBEDDED else check_url(value)

    @field_validator("host", "metrics_host")
    @classmethod
    def _host_name(cls, value: str | None) -> str | None:
        try:
            (value or "").encode("idna")
        except UnicodeError as error:
            raise ValueError("no host name") from error
        return value


def load_settings(**given: object) -> Settings:
    """Read the settings; what is `given` (and not None) goes before the environment.

    Raises:
        SettingsError: a value out of range, or a `SELLA_` variable that is no setting.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        raise SettingsError(f"{unknown[0]}: no such setting; remove it, or see docs/operations.md for their names")
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [f"{PREFIX}{'_'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors()]
        raise SettingsError("\n".join(lines)) from error
