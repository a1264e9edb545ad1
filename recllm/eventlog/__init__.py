"""Canonical tables to the event log: ids, splits, candidates, statistics, row sets."""
