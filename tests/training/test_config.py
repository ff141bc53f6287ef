import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.training.micro import MICRO
from training.config import Config, ConfigError, load_config, shipped_configs


def written(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"learning_rate": 1}, "learning_rate"),
        ({"adapt": {"rnak": 4}}, "adapt.rnak"),
        ({"project": {"schedule": {"epoch": 1}}}, "project.schedule.epoch"),
        ({"template": {"window": "sliding", "windows": 3}}, "template.windows"),
    ],
)
def test_an_unknown_key_is_refused_by_its_whole_name(tmp_path: Path, content: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {key}: "):
        load_config(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"adapt": {"rank": 0}}, r"adapt\.rank: .*greater than or equal to 1"),
        ({"align": {"temperature": 0}}, r"align\.temperature"),
        ({"dtype": "float16"}, "dtype: .*'float32' or 'bfloat16'"),
        ({"template": {"history_tokens": 4000}}, "max_tokens 2048 does not hold one prompt"),
        ({"adapt": 3}, r"adapt: .*AdaptConfig"),
        ("[]", r"config\.json: the whole: Input should be a valid dictionary"),
        ("{", "not JSON"),
    ],
)
def test_a_value_that_does_not_belong_is_refused_with_its_reason(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, content))


def test_a_missing_file_names_the_configurations_that_ship() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: No such file .*tiny-ml-1m"):
        load_config("nowhere.json")


def test_the_configurations_the_issue_asks_for_ship() -> None:
    wanted = {
        f"{backbone}-{data}" for backbone in ("tiny", "qwen2-0.5b", "qwen2-7b") for data in ("ml-1m", "amazon-book")
    }
    assert wanted | {"demo"} <= set(shipped_configs())


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_loads_and_calls_its_items_by_their_name(name: str) -> None:
    nouns = {"demo": "film", "ml-1m": "movie", "amazon-book": "book"}
    assert load_config(name).template.noun == next(noun for data, noun in nouns.items() if name.endswith(data))


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    loaded = load_config(written(tmp_path, {"adapt": {"rank": 3}}))
    assert loaded == Config(adapt=Config().adapt.model_copy(update={"rank": 3}))
    deep = load_config(written(tmp_path, {"adapt": {"schedule": {"epochs": 3}}})).adapt.schedule
    assert deep == Config().adapt.schedule.model_copy(update={"epochs": 3})
    assert load_config(None) == Config()


def test_a_configuration_cannot_be_changed_after_it_is_made() -> None:
    config = Config.changed_by(MICRO)
    for part, key in ((config, "seed"), (config.adapt, "rank"), (config.project.schedule, "epochs")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, 1)


def test_a_configuration_survives_its_own_json() -> None:
    config = Config.changed_by(MICRO)
    assert Config.model_validate(config.model_dump(mode="json")) == config
