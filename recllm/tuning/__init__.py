"""Tuning of a CRM's settings: a stated space, the same budget for every model, chosen on validation."""
