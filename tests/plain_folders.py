"""Which folder holds what, where a test sets many keys: `ARGS` are in folders' names."""

from recllm.config.request import parse
from recllm.pipeline.graph import Plan


def plain_folders(words, keys):
    """Folder of each stage of a command without keys of the configuration -> its folder with them.

    Both plans list the same stages in the same order.

    Args:
        words: goals and variables, e.g. `["stage3", "CRM=sim"]`.
        keys: `key=value` words.
    """
    plain, named = (Plan(parse(given)).needed() for given in (words, [*words, *keys]))
    assert [node.stage for node in plain] == [node.stage for node in named]
    return {one.folder: other.folder for one, other in zip(plain, named, strict=True)}
