"""What users call from their own programs: finished stages, loaded for use."""
