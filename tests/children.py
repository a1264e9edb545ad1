"""Programs that tests start: what they inherit of this one's environment."""

import os

OURS = ("MAKE", "RECLLM", "LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER")
"""How variables begin that say which make, artifacts or group of processes this process belongs to."""


def environment(**own):
    """What a user's shell would have of this process's variables, one thread, and what is given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **own}
