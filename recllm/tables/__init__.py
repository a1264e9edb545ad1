"""Raw files to canonical tables: events, items, users."""
