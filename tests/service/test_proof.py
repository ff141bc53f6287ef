"""A bundle whose hashes are right and whose contents are wrong is refused, whichever way it comes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from models.bundle import BundleError
from models.loading import Bundle
from models.template import TemplateConfig
from service.bundles.handle import open_parts
from service.cli import app
from service.collaborators import Collaborators
from tests.service.bundles import Family, forge, frame, give, make_family, nothing, put, roles, tensors
from tests.service.conftest import client_of, collaborators
from tests.service.echo import EchoEngine

NAN, INF = float("nan"), float("inf")
Change = Callable[[Path], None]


def short(held: np.ndarray) -> np.ndarray:
    return held[:-1]


def narrow(held: np.ndarray) -> np.ndarray:
    return held[..., :-1]


def text(name: str, **changed: object) -> Change:
    """Change fields of a JSON file; Python's JSON knows NaN and Infinity."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        for key, value in changed.items():
            place = fields
            *path, last = key.split("__")
            for part in path:
                place = place[part]
            place[last] = value
        (folder / name).write_text(json.dumps(fields))

    return change


def cell(column: str, value: object, row: int = 1) -> Callable[[pl.DataFrame], pl.DataFrame]:
    def change(held: pl.DataFrame) -> pl.DataFrame:
        values = held[column].to_list()
        values[row] = value
        return held.with_columns(pl.Series(column, values, held.schema[column]))

    return change


def without(column: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda held: held.drop(column)


def as_text(column: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda held: held.with_columns(pl.col(column).cast(pl.String))


def garbage(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f garbage") and None


COLLAB, SEMANTIC, PROJECTION = "collab.safetensors", "semantic.safetensors", "projection.safetensors"
WRONG: list[tuple[str, Change]] = [
    *((name, garbage(name)) for name in (COLLAB, SEMANTIC, PROJECTION, "users.parquet", "items.parquet")),
    *((name, garbage(name)) for name in ("fold_in.json", "fusion.json")),
    *(
        (file, tensors(file, **{name: change}))
        for file, names in {
            COLLAB: ("user_vectors", "item_vectors", "fold_vectors", "prior_mean", "prior_covariance"),
            SEMANTIC: ("vectors", "map_center", "map_weight", "map_offset"),
            PROJECTION: (
                *("collab__inner__weight", "collab__inner__bias", "collab__outer__weight", "collab__outer__bias"),
                *("collab__center_C", "collab__spread_C", "warm__linear__weight", "warm__linear__bias"),
            ),
        }.items()
        for name in names
        for change in (put(NAN), put(INF, -1), short, narrow, lambda held: held.astype(np.float64), None)
    ),
    (PROJECTION, tensors(PROJECTION, collab__spread_C=put(0.0))),
    *(
        ("users.parquet", frame("users.parquet", change))
        for change in (
            cell("user_id", "u0"),
            cell("user_id", None),
            cell("user_id", ""),
            cell("trained", None),
            cell("impressions", -1),
            cell("positives", 10**6),
            cell("positives", None),
            cell("train_impressions", -5),
            cell("history_total", -1),
            cell("history_total", 0),
            cell("history", ["i1"]),
            cell("history", None),
            cell("history_times", [1.0]),
            cell("outcome_labels", [True]),
            lambda held: held.head(7),
            lambda held: pl.concat([held, held.with_columns(user_id=pl.col("user_id") + "x")]),
            lambda held: held.with_columns(history=pl.col("history").list.eval(pl.lit("gone"))),
            lambda held: held.with_columns(history=pl.col("history").list.eval(pl.lit(None, pl.String))),
            lambda held: held.with_columns(history_times=pl.col("history_times").list.eval(pl.element() * NAN)),
            lambda held: held.with_columns(outcome_times=pl.col("outcome_times").list.eval(pl.element() * INF)),
            as_text("impressions"),
            *(without(column) for column in ("user_id", "trained", "history", "history_total", "positives")),
        )
    ),
    *(
        ("items.parquet", frame("items.parquet", change))
        for change in (
            cell("item_id", "i0"),
            cell("item_id", None),
            cell("title", None),
            cell("trained", None),
            cell("impressions", -1),
            cell("positives", 10**6),
            lambda held: held.head(7),
            as_text("trained"),
            *(without(column) for column in ("item_id", "title", "trained", "impressions")),
        )
    ),
    *(
        ("fold_in.json", text("fold_in.json", **{name: value}))
        for name, value in (("noise", NAN), ("noise", 0), ("target", INF), ("strength", -1), ("drift_seconds", 0))
    ),
    *(
        ("fusion.json", text("fusion.json", **{name: value}))
        for name, value in (
            ("live__intercept", NAN),
            ("static__intercept", INF),
            ("rates__user_strength", INF),
            ("live__weights__lm__value", NAN),
            ("live__weights__taste__value", 1e308),
            ("live__weights__recent_likes__most", NAN),
        )
    ),
]


@pytest.mark.parametrize(("file", "change"), WRONG, ids=[f"{place}-{file}" for place, (file, _) in enumerate(WRONG)])
def test_wrong_contents_are_refused_by_one_line_that_names_the_file(
    bundle: Bundle, tmp_path: Path, file: str, change: Change
) -> None:
    forged = forge(bundle, tmp_path / "forged", change)
    with pytest.raises(BundleError) as refused:
        open_parts(forged)
    message = str(refused.value)
    assert file in message and "\n" not in message


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"dimensions": {name: value}}
            for name in ("users", "items", "d_collab", "d_hidden", "d_model")
            for value in (7,)
        ),
        {"reference": {"score_deciles": "none"}},
        {"reference": {"cold_user_rate": [1]}},
    ],
)
def test_a_manifest_that_its_files_do_not_fit_is_refused(
    bundle: Bundle, tmp_path: Path, fields: dict[str, Any]
) -> None:
    if "dimensions" in fields:
        fields = {"dimensions": bundle.manifest.dimensions.model_copy(update=fields["dimensions"])}
    forged = forge(bundle, tmp_path / "forged", nothing, **fields)
    with pytest.raises(BundleError, match=r"parquet|safetensors|manifest\.json"):
        open_parts(forged)


def test_an_adapter_under_the_name_of_other_merged_weights_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    file = "adapter/adapter_model.safetensors"
    with pytest.raises(BundleError, match="adapter: not the adapter"):
        forge(bundle, tmp_path / "forged", lambda folder: (folder / file).write_bytes(b"\0" * 64) and None)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = make_family(tmp_path_factory.mktemp("family"))
    nan_bias = tensors(PROJECTION, warm__linear__bias=put(NAN))
    forge(family.alike, family.folder / "nan-alike", nan_bias)
    forge(family.other, family.folder / "nan-other", nan_bias)
    forge(family.alike, family.folder / "short", tensors(COLLAB, user_vectors=short))
    return family


@pytest.fixture
def service(family: Family) -> Collaborators:
    return collaborators(family.first, EchoEngine(), *(EchoEngine() for _ in range(4)))


@pytest.mark.anyio
@pytest.mark.parametrize("role", ["current", "canary", "shadow"])
async def test_every_role_is_refused_to_it(service: Collaborators, family: Family, role: str) -> None:
    share = {"share": 0.5} if role == "canary" else {}
    async with client_of(service) as client:
        for name, file in (("nan-alike", PROJECTION), ("nan-other", PROJECTION), ("short", COLLAB)):
            answer = await give(client, name, role, **share)
            assert answer.status_code == 422 and file in answer.json()["error"]["message"], answer.text
        with pytest.raises(Exception, match=COLLAB):
            await service.changes.follow(Bundle.open(family.folder / "short").id)
        assert await roles(client) == {"current": family.first.id}
    await service.changes.free()


@pytest.mark.anyio
async def test_a_bundle_that_is_loaded_already_is_hashed_again(service: Collaborators, family: Family) -> None:
    path = family.alike.folder / "semantic.safetensors"
    held = path.read_bytes()
    async with client_of(service) as client:
        assert (await give(client, family.alike, "canary", share=0.5)).status_code == 200
        path.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        try:
            answer = await give(client, family.alike)
        finally:
            path.write_bytes(held)
        assert answer.status_code == 422 and "semantic.safetensors: altered" in answer.text
        assert (await roles(client))["current"] == family.first.id
        assert (await give(client, family.alike)).status_code == 200
    await service.changes.free()


@pytest.mark.anyio
async def test_a_prompt_that_the_engine_does_not_score_is_a_refusal(family: Family) -> None:
    broken = EchoEngine()
    broken.error = RuntimeError("out of order")
    service = collaborators(family.first, EchoEngine(), broken)
    async with client_of(service) as client:
        answer = await give(client, family.other)
        assert answer.status_code == 422 and "out of order" in answer.text
        assert broken.closed and await roles(client) == {"current": family.first.id}
    await service.changes.free()


@pytest.mark.anyio
async def test_a_pipe_among_the_files_is_refused_at_once(service: Collaborators, family: Family) -> None:
    async with client_of(service) as client:
        for name in ("manifest.json", "fusion.json"):
            folder = family.folder / f"pipe-{name}"
            forged = forge(family.alike, folder, nothing)
            (forged.folder / name).unlink()
            os.mkfifo(forged.folder / name)
            answer = await give(client, folder.name)
            assert answer.status_code == 422 and name in answer.json()["error"]["message"], answer.text
    await service.changes.free()


@pytest.mark.parametrize("name", ["nan-alike", "short"])
def test_the_service_does_not_start_with_it(family: Family, name: str) -> None:
    done = CliRunner().invoke(app, ["run", "--bundle", str(family.folder / name), "--port", "0"])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and ".safetensors: tensor" in done.stderr


def test_a_template_whose_prompts_are_longer_than_the_model_takes_is_refused_also_where_weights_are_shared(
    bundle: Bundle, tmp_path: Path
) -> None:
    from models.backbone import BackboneError
    from service.engines.packed import PackedModel
    from service.engines.protocol import BundlePlace

    template = TemplateConfig(history_tokens=100_000, max_history=200, title_tokens=100)
    forged = forge(bundle, tmp_path / "forged", nothing, template=template)
    packed = PackedModel(bundle, bundle.model(), batch_tokens=2048)
    with pytest.raises(BackboneError, match="longest prompt takes"):
        packed.attach(BundlePlace(forged.folder, forged.id))
