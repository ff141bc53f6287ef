"""From ids and features to what an engine computes: the one place where a pair's prompt and vectors are assembled.

Evaluation, batch scoring and the service all come through here, cold users and items included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from models.cold import UserPrior
from models.features import Evidence, HistoryItem, ItemFeatures, UserFeatures
from models.fusion import Counts, Known, raw_logits
from models.packs import Branch, Pack, ScoringGroup
from models.segments import Segment
from models.template import PromptKind, Template, Title, window_start

Floats = NDArray[np.float32]
UNKNOWN_AGES, NO_AGES = np.full(1, np.nan, np.float32), np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class HistoryUse:
    """What became of a history: how many items were given, stand in the prompt, and were left out."""

    given: int
    used: int
    dropped: int


@dataclass(frozen=True, slots=True)
class AssembledUser:
    """The instruction and user segment, the user's vectors, and what to report."""

    segment: Segment
    vector_C: Floats  # behind <User_ID>
    live_C: Floats  # for `score` with live counts; equal to `vector_C` until `Assembler.updated`
    liked_C: Floats  # the mean of the shown items' vectors; zero without a history
    like_ages_L: Floats  # of the newest likes, for the counts of recent likes; NaN if not known, empty if all are old
    shown: tuple[HistoryItem, ...]  # the history items in the prompt
    history: HistoryUse
    cold: bool
    titles_cut: int  # history titles that the token cap shortened


def history_window(history: Sequence[str], total: int, template: Template) -> tuple[str, ...]:
    """Return the ids of the window out of a history's tail; `total` counts the whole history.

    Raises:
        ValueError: the tail is too short for the window.
    """
    wanted = total - window_start(total, template.config)
    if wanted > len(history):
        raise ValueError(f"a history of {total} items needs its last {wanted}; {len(history)} were given")
    return tuple(history[len(history) - wanted :])


def like_ages(times: Sequence[float] | NDArray[np.float64], at: float, template: Template) -> Floats:
    """Return how long before a moment each of a user's newest likes was, `(L,)` seconds; at most `max_history` likes.

    `times` and `at` are UTC seconds. A like after the moment, by the clock of another machine, has the age 0.
    """
    newest = np.asarray(times, np.float64)[max(0, len(times) - template.config.max_history) :]
    return np.maximum(at - newest, 0.0).astype(np.float32)


class Assembler:
    """Assembles prompts and vectors for one bundle."""

    def __init__(self, template: Template, prior: UserPrior, *, title_cache: int = 65536) -> None:
        self.template = template
        self.prior = prior
        # Catalogue titles recur in every request; each is tokenized once.
        title = self._title = lru_cache(maxsize=title_cache)(lambda text: template.titles([text])[0])
        # Not through self: a cycle would keep a freed bundle's caches until the next full garbage collection.
        self._candidate = lru_cache(maxsize=title_cache)(
            lambda text: template.candidate(PromptKind.PROJECT, title(text))
        )

    def title(self, text: str) -> Title:
        """Return a title's tokens under the cap."""
        return self._title(text)

    def user(
        self,
        user: UserFeatures | None,
        window: Sequence[HistoryItem],
        total: int,
        like_ages_L: Floats = UNKNOWN_AGES,
    ) -> AssembledUser:
        """Assemble the user segment for a window of liked items, oldest first, out of a history of `total`.

        A user without a trained vector is folded in from the items that the prompt shows. `like_ages_L` comes from
        `like_ages`.
        """
        titles = [self.title(item.title) for item in window]
        first = self.template.first_kept(titles)
        shown, titles = window[first:], titles[first:]
        cold = user is None or user.vector_C is None
        liked_LC = _stack([item.fold_C for item in shown], len(self.prior.mean_C))
        vector = self.prior.fold_in(liked_LC) if user is None or user.vector_C is None else user.vector_C
        kind = PromptKind.PROJECT
        return AssembledUser(
            segment=self.template.instruction(kind) + self.template.user_segment(kind, titles),
            vector_C=vector,
            live_C=vector,
            liked_C=liked_LC.sum(axis=0) / np.float32(max(1, len(liked_LC))),
            like_ages_L=like_ages_L,
            shown=tuple(shown),
            history=HistoryUse(given=total, used=len(shown), dropped=total - len(shown)),
            cold=cold,
            titles_cut=sum(title.cut > 0 for title in titles),
        )

    def updated(self, user: AssembledUser, evidence: Evidence, at: float) -> AssembledUser:
        """Return the user with a live vector updated with known outcomes, for a score at a moment (UTC seconds).

        A cold user's history items are observed too. An item with a positive outcome in the evidence is then observed
        only as outcome.
        """
        liked = [item.fold_C for item in user.shown if item.item_id not in evidence.positives]
        live_C = self.prior.updated(
            None if user.cold else user.vector_C,
            evidence.impressions,
            evidence.items_HC,
            evidence.labels_H,
            evidence.times_H,
            at,
            _stack(liked, len(self.prior.mean_C)),
        )
        return replace(user, live_C=live_C)

    def group(self, user: AssembledUser, candidates: Sequence[ItemFeatures]) -> ScoringGroup:
        """Assemble one packed prompt: the user segment, then every candidate behind it."""
        attach = len(user.segment)
        return ScoringGroup(
            pack=Pack(user.segment, tuple(Branch(attach, self._candidate(item.title)) for item in candidates)),
            user_1C=user.vector_C[None],
            item_KC=np.stack([item.collab_C for item in candidates]),
            semantic_KD=np.stack([item.semantic_D for item in candidates]),
        )


def known_pairs(
    raw_K: Floats,
    group: ScoringGroup,
    user: tuple[Counts, AssembledUser],
    items: Sequence[tuple[Counts, bool]],
    *,
    live: bool,
) -> Known:
    """Return the inputs of `Fusion` for a group's pairs.

    `user` holds the user's counts and the assembled user; `items` hold each item's counts and whether it is cold.
    `live` says whether the counts are live or only the bundle's.
    """
    counts_K2 = np.array([counts for counts, _ in items], np.int64)
    (impressions, positives), assembled = user
    return Known(
        lm_K=raw_logits(raw_K),
        user_KC=np.broadcast_to(group.user_1C, group.item_KC.shape),
        live_user_KC=np.broadcast_to(assembled.live_C if live else group.user_1C, group.item_KC.shape),
        item_KC=group.item_KC,
        liked_KC=np.broadcast_to(assembled.liked_C, group.item_KC.shape),
        user_impressions_K=np.full(len(items), impressions),
        user_positives_K=np.full(len(items), positives),
        item_impressions_K=counts_K2[:, 0],
        item_positives_K=counts_K2[:, 1],
        cold_user_K=np.full(len(items), assembled.cold),
        cold_item_K=np.array([cold for _, cold in items], np.bool_),
        like_ages_KL=np.broadcast_to(assembled.like_ages_L, (len(items), len(assembled.like_ages_L))),
        live=live,
    )


def _stack(vectors: Sequence[Floats], width: int) -> Floats:
    return np.stack(vectors) if vectors else np.zeros((0, width), np.float32)
