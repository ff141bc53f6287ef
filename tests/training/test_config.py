import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.training.micro import MICRO
from training.config import Config, ConfigError, load_config, shipped_configs
from training.reference import configuration_keys, configuration_reference


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
        ({"template": {"history_tokens": 4000}}, "max_tokens 1024 does not hold one prompt"),
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


def test_an_unnamed_plural_is_the_noun_with_an_s(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, {"template": {"noun": "tea"}})).template.plural == "teas"
    knives = load_config(written(tmp_path, {"template": {"noun": "knife", "plural": "knives"}}))
    assert knives.template.plural == "knives"
    assert Config().calling_items("tea", None).template.plural == "teas"
    assert knives.calling_items("fork", None).template.plural == "forks"
    assert knives.calling_items(None, "blades").template.noun == "knife"
    with pytest.raises(ConfigError, match="--plural teas: it takes --noun"):
        Config().calling_items(None, "teas")
    with pytest.raises(ConfigError, match="at most 40 characters"):
        Config().calling_items("t" * 41, None)


def test_a_configuration_knows_whether_the_noun_was_named(tmp_path: Path) -> None:
    unnamed = load_config(written(tmp_path, {"template": {"max_history": 3}, "seed": 1}))
    assert "noun" not in unnamed.template.model_fields_set and unnamed.template.max_history == 3
    assert "noun" not in Config().template.model_fields_set
    assert "noun" in load_config("demo").template.model_fields_set
    named = unnamed.calling_items("tea", None)
    assert "noun" in named.template.model_fields_set and named.template.max_history == 3


def test_every_key_is_described_and_the_page_of_the_documents_is_the_models_own() -> None:
    assert [key for key, _, field in configuration_keys(Config()) if not field.description] == []
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == configuration_reference(), "sella-train configuration > docs/configuration.md"


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("qwen")])
def test_a_configuration_for_a_gpu_runs_all_of_its_epochs(name: str) -> None:
    """The defaults bound the steps of stages 1 and 3 for a CPU; these configurations name epochs."""
    config = load_config(name)
    assert config.adapt.schedule.max_steps is None and config.project.schedule.max_steps is None
