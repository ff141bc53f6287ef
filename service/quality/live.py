"""Joins outcomes with the scores that they answer."""

import time
from collections.abc import Callable, Sequence

from service.interactions.event import Interaction
from service.metrics.quality import QualityMetrics
from service.quality.served import UNLABELLED, ServedRequest, ServedScore, ServedScores


class LiveQuality:
    """Remembers what was served and labels it when its outcome comes. `clock` gives monotonic seconds."""

    def __init__(self, served: ServedScores, metrics: QualityMetrics, clock: Callable[[], float] = time.monotonic):
        self._served = served
        self._metrics = metrics
        self._clock = clock

    def remember(self, request_id: str, bundle: str, results: Sequence[ServedScore]) -> None:
        """Keep the results of an answer of the bundle with this short id."""
        self._served.add(request_id, bundle, results, self._clock())
        self._metrics.served(self._served.scores)

    def on_outcome(self, interaction: Interaction, label: bool) -> None:
        """Label the score that showed the item. A negative may become positive later; a positive stays."""
        self._metrics.outcome(self._join(interaction, label))

    def forget(self, user_id: str) -> None:
        """Forget what was served to a user. Labelled scores stay: they are numbers that name nobody."""
        self._served.forget(user_id)
        self._metrics.served(self._served.scores)

    def _join(self, interaction: Interaction, label: bool) -> str:
        if interaction.request_id is None:
            return "no_request"
        request = self._served.find(interaction.request_id, self._clock(), interaction.user_id)
        if request is None:
            return "unknown_request"
        place = _place(request, interaction)
        if isinstance(place, str):
            return place
        return self._label(request, place, label)

    def _label(self, request: ServedRequest, place: int, label: bool) -> str:
        window = self._metrics.window(request.bundle)
        if window is None:
            return "retired_bundle"
        number = int(request.numbers_K[place])
        if number != UNLABELLED and (not label or request.positive_K[place]):
            return "repeated"
        request.positive_K[place] = label
        if number == UNLABELLED:
            request.numbers_K[place] = window.add(float(request.scores_K[place]), label)
            return "labelled"
        window.relabel(number, label)
        return "relabelled"


def _place(request: ServedRequest, interaction: Interaction) -> int | str:
    """Return where the shown result stands, or why there is none."""
    if interaction.position is None:
        place = request.place_of_pair(interaction.user_id, interaction.item_id)
        return "other_pair" if place is None else place
    place = request.place_of(interaction.position)
    if place is None:
        return "other_place"
    agrees = (request.user_id(place), request.item_ids[place]) == (interaction.user_id, interaction.item_id)
    return place if agrees else "other_pair"
