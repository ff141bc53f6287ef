"""The sizes of the micro run: 60 users, 80 items, two thin layers, one epoch a stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import Config

SIZES: dict[str, int] = {"users": 60, "items": 80, "train_rows": 800, "valid_rows": 200, "test_rows": 200}

MICRO: dict[str, Any] = {
    "template": {"history_tokens": 128},
    "max_tokens": 2048,
    "tiny": {
        "vocabulary": 600,
        "d_model": 32,
        "d_inner": 64,
        "layers": 2,
        "heads": 2,
        "key_value_heads": 1,
        "sequence_tokens": 64,
        "schedule": {"epochs": 1, "learning_rate": 0.003, "batch_targets": 16, "min_steps": 0},
    },
    "adapt": {"rank": 4, "alpha": 8, "schedule": {"epochs": 1, "learning_rate": 0.003}},
    "align": {
        "d_collab": 8,
        "d_hidden": 16,
        "schedule": {"epochs": 4, "learning_rate": 0.01, "batch_targets": 256},
    },
    "project": {"schedule": {"epochs": 1, "learning_rate": 0.003, "min_steps": 0}},
}


@dataclass(frozen=True)
class Trained:
    """A micro run that went the whole way: its folders, and the report `fit` returned."""

    data: Path
    folder: Path
    bundle: Path
    report: dict[str, Any]
    config: Config
