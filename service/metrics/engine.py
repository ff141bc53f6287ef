"""What the engines computed, what they saved, and the memory they take."""

from collections import defaultdict
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge

from service.engines.protocol import Engine, EngineUsage

_NOTHING = EngineUsage()


class EngineMetrics:
    """Adds up the engines' own counts, whichever bundles they serve and however many there are."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._restarts = Counter("sella_engine_restarts_total", "Worker processes lost.", registry=registry)
        self._counters = {
            "forwards": Counter("sella_forwards_total", "Forwards computed to score.", registry=registry),
            "tokens": Counter(
                "sella_tokens_total", "Tokens of prompts to score that were computed.", registry=registry
            ),
            "tokens_cached": Counter(
                "sella_cached_tokens_total", "Tokens of prompts to score that the cache held.", registry=registry
            ),
            "tokens_saved_by_packing": Counter(
                "sella_packing_saved_tokens_total",
                "Tokens of prompts to score that were not computed because one forward shares them.",
                registry=registry,
            ),
        }
        self._cache = Gauge(
            "sella_engine_cache_bytes", "Keys and values kept of prompts' beginnings.", ["device"], registry=registry
        )
        self._memory = Gauge(
            "sella_engine_memory_bytes",
            "Memory in use on a GPU by all, or resident in the workers on a CPU.",
            ["device"],
            registry=registry,
        )
        self._memory_total = Gauge(
            "sella_engine_memory_total_bytes",
            "Memory that the device, or the machine or container, has.",
            ["device"],
            registry=registry,
        )
        self._known: WeakKeyDictionary[Engine, EngineUsage] = WeakKeyDictionary()

    def restarted(self) -> None:
        """Count a worker process lost."""
        self._restarts.inc()

    def read(self, engines: Iterable[Engine]) -> None:
        """Take what every engine that is open has done since it was read last."""
        usages: dict[str, list[EngineUsage]] = defaultdict(list)
        for engine in set(engines):
            usage = engine.usage()
            before = self._known.get(engine, _NOTHING)
            for name, counter in self._counters.items():
                counter.inc(getattr(usage, name) - getattr(before, name))
            self._known[engine] = usage
            if usage.device:
                usages[usage.device].append(usage)
        for gauge in (self._cache, self._memory, self._memory_total):
            gauge.clear()
        for device, found in usages.items():
            # A GPU tells the memory in use by all of its processes; workers on a CPU tell each their own.
            used = [usage.memory_bytes for usage in found]
            self._memory.labels(device).set(sum(used) if device == "cpu" else max(used))
            self._memory_total.labels(device).set(max(usage.memory_total_bytes for usage in found))
            self._cache.labels(device).set(sum(usage.cache_bytes for usage in found))
