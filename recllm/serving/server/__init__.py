"""An HTTP service over a bundle: `python -m recllm.serving bundle/`."""
