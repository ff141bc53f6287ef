"""Where users and items are looked up: the store protocol and the bundle's own tables."""
