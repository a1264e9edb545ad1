"""Tables, histories, splits, prompts, batches: everything between an interaction log and a model's input."""
