"""What users call from their own programs, or over HTTP: finished stages, loaded for use."""
