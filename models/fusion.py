"""The served score: one small logistic model over all inputs that are known of a pair.

`raw_score` is the language model's softmax (Eq. 3). `score` is the probability of a logistic model whose inputs are the
language model's logit, the parts of the collaborative prediction, the smoothed rates of positives of the user and of
the item, and the cold flags. Evaluation and service call the same code.

A rate enters as its smoothed distance from the base rate in log-odds: without evidence the distance is zero. Each rate
enters with two strengths of smoothing, so that the model can tell much evidence from little. Only the cold flags may
have negative weights, so one more positive in an item's counts never lowers its score. Static counts end with the
training data, live counts at this moment: each kind has its own weights. With live counts the user's bias and taste
come from a user vector that is updated with the user's newest outcomes (`UserPrior.updated`).

A user who has liked several items within minutes tends to like the next one too. So the user's newest likes count once
more, each with a weight that decays with its age: over minutes, and over a day. A count larger than any of valid is
taken as the largest of valid. Where the ages are not known, the mean count of valid stands in. The likes in the prompt
also show the taste of the moment: the mean of their items' vectors is a second vector of the user's taste.

Shapes: K pairs, C = d_C, L likes of a user.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

SLOW = 8.0  # strength of the second, slower smoothing, as a multiple of the fitted strength
RECENT_S, RECENT_SLOW_S = 300.0, 86_400.0  # the age at which a like counts 1 / e in each count of recent likes


class Counts(NamedTuple):
    """The number of impressions with a known outcome, and the number of positives among them."""

    impressions: int = 0
    positives: int = 0

    def __add__(self, other: object) -> "Counts":
        if not isinstance(other, Counts):
            return NotImplemented
        return Counts(self.impressions + other.impressions, self.positives + other.positives)


@dataclass(frozen=True)
class Known:
    """The inputs of the fusion for K pairs; each field has shape (K,), the vectors (K, C).

    Attributes:
        lm_K: the language model's logit, log p(Yes) - log p(No).
        user_KC: collaborative vectors of the users, [p, b_u, 1], as trained or folded in from a history.
        live_user_KC: `user_KC` updated with the outcomes known at this moment; equal to `user_KC` for static counts.
        item_KC: collaborative vectors of the items, [q, 1, b_i].
        liked_KC: the mean of the collaborative vectors of the liked items in the prompt, [q, 1, b_i]; zero without any.
        user_impressions_K, user_positives_K: the user's impressions with a known outcome, and the positives.
        item_impressions_K, item_positives_K: the item's.
        cold_user_K, cold_item_K: True where the vector was not trained.
        like_ages_KL: how long ago each of the user's newest likes was, in seconds; infinite where there is none; NaN
            where the ages of a user's likes are not known.
        live: whether the counts are live (up to this moment) or static (of the training data alone).
    """

    lm_K: NDArray[np.floating]
    user_KC: Floats
    live_user_KC: Floats
    item_KC: Floats
    liked_KC: Floats
    user_impressions_K: NDArray[np.integer]
    user_positives_K: NDArray[np.integer]
    item_impressions_K: NDArray[np.integer]
    item_positives_K: NDArray[np.integer]
    cold_user_K: NDArray[np.bool_]
    cold_item_K: NDArray[np.bool_]
    like_ages_KL: Floats
    live: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError if lengths differ."""
        lengths = {name: len(values) for name, values in self._arrays().items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"fields of different lengths: {lengths}")

    def rows(self, chosen: slice | NDArray[np.integer]) -> "Known":
        """Return the inputs of the chosen pairs."""
        return replace(self, **{name: values[chosen] for name, values in self._arrays().items()})

    def _arrays(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "live"}


class Rates(BaseModel):
    """How counts become rates: the base rate, and how many impressions at the base rate are added to the counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: float = Field(0.5, gt=0, lt=1, description="share of positives in train")
    user_strength: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="impressions at the base rate that a user starts with"
    )
    item_strength: float = Field(
        5.0, gt=0, allow_inf_nan=False, description="impressions at the base rate that an item starts with"
    )

    def distance(
        self, positives_K: NDArray[np.integer], impressions_K: NDArray[np.integer], strength: float
    ) -> Doubles:
        """Return each smoothed rate's distance from the base rate in log-odds, `(K,)`; zero without evidence."""
        hits = positives_K + strength * self.base
        misses = impressions_K - positives_K + strength * (1 - self.base)
        return np.asarray(np.log(hits / misses) - np.log(self.base / (1 - self.base)), np.float64)


class Weight(BaseModel):
    """One input's weight, with its 95 % interval (bootstrap over users), and the input's mean and largest value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float = Field(allow_inf_nan=False)
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    mean: float = Field(0.0, allow_inf_nan=False, description="of the input over valid")
    most: float = Field(0.0, allow_inf_nan=False, description="the largest value of the input in valid")


# The inputs in the order of the weights, each with the part of the score that it belongs to.
INPUTS: Mapping[str, str] = {
    "lm": "lm",
    "user_bias": "collab",
    "item_bias": "collab",
    "taste": "collab",
    "user_rate": "user_rate",
    "user_rate_slow": "user_rate",
    "item_rate": "item_rate",
    "item_rate_slow": "item_rate",
    "recent_likes": "recent_likes",
    "recent_likes_slow": "recent_likes",
    "recent_taste": "recent_likes",
    "cold_user": "cold",
    "cold_item": "cold",
}
RECENT = ("recent_likes", "recent_likes_slow")  # counts, which may be unknown
PARTS = ("lm", "collab", "user_rate", "item_rate", "recent_likes", "cold", "intercept")
SIGNED = frozenset(
    {"cold_user", "cold_item"}
)  # a cold flag may raise or lower a score; the weights of other inputs are not negative


def probabilities(logits_K: NDArray[np.floating]) -> Doubles:
    """Return the probabilities of logits, `(K,)`, in fp64: fp32 rounds every logit above 16.6 to 1."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -logits_K.astype(np.float64))), np.float64)


class Weights(BaseModel):
    """One set of weights: the intercept and the weights of inputs by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    intercept: float = Field(0.0, allow_inf_nan=False)
    weights: dict[str, Weight] = Field({"lm": Weight(value=1.0, low=1.0, high=1.0)})

    @field_validator("weights")
    @classmethod
    def _known(cls, weights: dict[str, Weight]) -> dict[str, Weight]:
        if unknown := sorted(weights.keys() - INPUTS.keys()):
            raise ValueError(f"weights of unknown inputs: {', '.join(unknown)}")
        return weights


class Fusion(BaseModel):
    """The weights of `score` for static and for live counts, as the bundle holds them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rates: Rates = Rates()
    static: Weights = Weights()
    live: Weights = Weights()

    def inputs(self, known: Known) -> dict[str, Doubles]:
        """Return every input of the logistic model, `(K,)` each."""
        return fusion_inputs(known, self.rates)

    def parts(self, known: Known) -> dict[str, Doubles]:
        """Return what each part adds to the logit of `score`, `(K,)` each; they sum to it."""
        fitted = self.live if known.live else self.static
        parts = {name: np.zeros(len(known.lm_K)) for name in PARTS}
        parts["intercept"] += fitted.intercept
        for name, values in self.inputs(known).items():
            if (weight := fitted.weights.get(name)) is not None:
                if name in RECENT:
                    values = np.where(np.isnan(values), weight.mean, np.minimum(values, weight.most))
                parts[INPUTS[name]] += weight.value * values
        return parts

    def logits(self, known: Known) -> Doubles:
        """Return the logit of `score`, `(K,)`."""
        return np.asarray(np.sum([*self.parts(known).values()], axis=0), np.float64)

    def __call__(self, known: Known) -> Doubles:
        """Return `score`, `(K,)`: calibrated probabilities."""
        return probabilities(self.logits(known))


def fusion_inputs(known: Known, rates: Rates) -> dict[str, Doubles]:
    """Return every input of the logistic model by name, `(K,)` each, in the order of `INPUTS`; NaN if unknown."""
    user_KC = (known.live_user_KC if known.live else known.user_KC).astype(np.float64)
    item_KC = known.item_KC.astype(np.float64)
    user = (known.user_positives_K, known.user_impressions_K)
    item = (known.item_positives_K, known.item_impressions_K)
    inputs = {
        "lm": np.asarray(known.lm_K, np.float64),
        "user_bias": user_KC[:, -2],
        "item_bias": item_KC[:, -1],
        "taste": (user_KC[:, :-2] * item_KC[:, :-2]).sum(-1),
        "user_rate": rates.distance(*user, rates.user_strength),
        "user_rate_slow": rates.distance(*user, rates.user_strength * SLOW),
        "item_rate": rates.distance(*item, rates.item_strength),
        "item_rate_slow": rates.distance(*item, rates.item_strength * SLOW),
        "recent_likes": _recent(known.like_ages_KL, RECENT_S),
        "recent_likes_slow": _recent(known.like_ages_KL, RECENT_SLOW_S),
        "recent_taste": (known.liked_KC[:, :-2].astype(np.float64) * item_KC[:, :-2]).sum(-1),
        "cold_user": known.cold_user_K.astype(np.float64),
        "cold_item": known.cold_item_K.astype(np.float64),
    }
    assert tuple(inputs) == tuple(INPUTS)
    return inputs


def _recent(ages_KL: Floats, seconds: float) -> Doubles:
    """Return the number of likes, `(K,)`, each weighted by exp(-age / seconds); NaN if an age is."""
    return np.asarray(np.exp(-ages_KL.astype(np.float64) / seconds).sum(axis=-1), np.float64)
