"""Published models in Omni's layout. Each importer refuses by name what it does not know."""
