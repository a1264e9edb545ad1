"""An event log's rows to tokens: prompts, completions, documents."""
