"""Causal language models: loading, scoring answers and titles, the tiny one that is trained here."""
