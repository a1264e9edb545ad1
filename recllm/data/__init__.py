"""Tables, histories, splits, prompts and batches: everything between an interaction log and a model's input."""
