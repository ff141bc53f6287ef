"""Which store a bundle's users and items are looked up in."""

from models.features import Tables
from service.features.embedded import EmbeddedStore
from service.features.protocol import FeatureStore


def open_store(bundle_id: str, tables: Tables) -> FeatureStore:
    """Return the store of one bundle: its own tables."""
    return EmbeddedStore(bundle_id, tables)
