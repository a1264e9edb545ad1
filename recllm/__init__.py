"""LLM-enhanced recommendation: a conventional model, an LM personalized by it, preference alignment."""

__version__ = "0.1.0"
