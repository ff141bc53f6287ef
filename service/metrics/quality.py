"""How good each bundle's scores turn out to be."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from service.quality.window import LabelledWindow

# What can become of a reported outcome; the last five join no score.
OUTCOMES = (
    "labelled",
    "relabelled",
    "repeated",
    "no_request",
    "unknown_request",
    "other_place",
    "other_pair",
    "retired_bundle",
)
_FIGURES = {
    "auc": ("sella_live_auc", "AUC of the latest labelled scores."),
    "log_loss": ("sella_live_log_loss", "Log-loss of the latest labelled scores, in nats."),
    "calibration_ratio": ("sella_live_calibration_ratio", "Mean latest labelled score over the share of positives."),
    "calibration_error": ("sella_live_calibration_error", "Expected calibration error of the latest labelled scores."),
}


class QualityMetrics:
    """Figures over each bundle's latest labelled scores, and what became of the outcomes."""

    def __init__(self, registry: CollectorRegistry, window: int) -> None:
        self._window = window
        self._windows: dict[str, LabelledWindow] = {}
        self._outcomes = Counter(
            "sella_outcomes_total",
            "Outcomes reported after a score, by what became of them.",
            ["outcome"],
            registry=registry,
        )
        for outcome in OUTCOMES:
            self._outcomes.labels(outcome)
        self._served = Gauge("sella_served_scores", "Served scores kept to be labelled.", registry=registry)
        self._labelled = Gauge(
            "sella_live_labelled",
            "Latest labelled scores that the figures are of.",
            ["bundle", "label"],
            registry=registry,
        )
        self._figures = {
            field: Gauge(name, documentation, ["bundle"], registry=registry)
            for field, (name, documentation) in _FIGURES.items()
        }

    def begin(self, bundle: str) -> None:
        """Take a bundle's labelled scores from now on."""
        self._windows.setdefault(bundle, LabelledWindow(self._window))

    def window(self, bundle: str) -> LabelledWindow | None:
        """Return a bundle's labelled scores; None once it is retired."""
        return self._windows.get(bundle)

    def outcome(self, outcome: str) -> None:
        """Count a reported outcome."""
        self._outcomes.labels(outcome).inc()

    def served(self, scores: int) -> None:
        """Record how many served scores are kept."""
        self._served.set(scores)

    def refresh(self) -> None:
        """Compute the figures anew; one that the labels do not allow has no series."""
        for bundle, window in self._windows.items():
            figures = window.figures()
            self._labelled.labels(bundle, "1").set(figures.positives)
            self._labelled.labels(bundle, "0").set(figures.labelled - figures.positives)
            for field, gauge in self._figures.items():
                value = getattr(figures, field)
                if value is None:
                    gauge.remove_by_labels({"bundle": bundle})
                else:
                    gauge.labels(bundle).set(value)

    def retire(self, bundle: str) -> None:
        """Forget a bundle and drop its series."""
        self._windows.pop(bundle, None)
        for gauge in (self._labelled, *self._figures.values()):
            gauge.remove_by_labels({"bundle": bundle})
