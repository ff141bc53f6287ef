import pytest

from models.loading import Bundle
from service.features.embedded import EmbeddedStore
from service.features.protocol import Query

pytestmark = pytest.mark.anyio


async def test_one_call_answers_users_items_and_stored_histories(bundle: Bundle) -> None:
    tables = bundle.tables()
    store = EmbeddedStore(bundle.id, tables)
    found = await store.look_up(
        bundle.id, Query(frozenset({"u0", "u1", "nobody"}), frozenset({"i3", "nothing"}), frozenset({"u1", "nobody"}))
    )
    stored = tables.user("u1")
    assert stored is not None
    assert found.users.keys() == {"u0", "u1"}
    assert found.items.keys() == {"i3"}
    assert found.history_items.keys() == {*stored.history} - {"i3"}
    assert all(found.history_item(one) is not None for one in stored.history)
    assert (await store.health()).ready


async def test_another_bundles_query_is_refused(bundle: Bundle) -> None:
    store = EmbeddedStore(bundle.id, bundle.tables())
    with pytest.raises(KeyError):
        await store.look_up("0" * 64, Query(frozenset(), frozenset(), frozenset()))
