"""From what a person names (files, prefixes, tables, shards) to a frozen manifest with one row per image."""
