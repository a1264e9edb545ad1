"""What may be said: every configuration key, how layers are merged, and what is asked of make."""
