import re

import pytest

from recllm.config.merge import merge
from recllm.errors import ConfigError

GOOD = {
    "events": {"path": "e.csv", "rating": "stars", "rating_scale": [1, 5]},
    "items": {"path": "i.csv"},
    "label": {"threshold": 3},
}


def config(**changes):
    source = {section: dict(keys) for section, keys in GOOD.items()}
    for key, value in changes.items():
        section, _, last = key.partition("__")
        if last:
            source.setdefault(section, {})[last] = value
        else:
            source[section] = value
    return merge([("conf/dataset/x.yaml", {"source": source})], {}).source


def test_a_section_that_says_what_is_needed():
    assert config().given
    assert config(label__rule="clicks", label__threshold=None, events__rating="").given
    assert config(label__rule="column", label__column="bought", label__history=["maybe"]).given
    assert config(events__time_unit="%Y").given


def test_without_a_path_nothing_is_asked():
    assert not merge([], {}).source.given
    assert not config(events__path="", label__rule="column").given


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"items__path": ""}, "source.items.path=''"),
        ({"events__user": ""}, "source.events.user=''"),
        ({"items__title": ""}, "source.items.title=''"),
        ({"items__untitled": "Item {sku}"}, "source.items.untitled='Item {sku}'"),
        ({"events__rating_scale": [5, 1]}, "rating_scale=[5.0, 1.0] is not usable; wanted [lowest, highest]"),
        ({"events__rating_scale": []}, "source.events.rating_scale=[]"),
        ({"events__rating": ""}, "source.events.rating=''"),
        ({"events__rating_step": -1}, "source.events.rating_step=-1"),
        ({"events__time_unit": "minutes"}, "time_unit='minutes' is not usable; wanted seconds, milliseconds"),
        ({"events__separator": "::"}, "events.separator='::' is not usable; wanted one ASCII character"),
        ({"items__escape": "ab"}, "items.escape='ab' is not usable; wanted one ASCII character"),
        ({"items__escape": '"'}, "wanted another sign than ('', '\"'), and a quote"),
        ({"items__escape": "x", "items__quote": ""}, "items.escape='x' is not usable; wanted another sign"),
        ({"events__nulls": ["NA", None]}, "events.nulls=None is not usable; wanted a text in single quotes"),
        ({"items__nulls": ["\x85"]}, r"items.nulls='\x85' is not usable; wanted a text in single quotes"),
        ({"label__history": [None]}, "source.label.history=None is not usable; wanted a text in single"),
        ({"users__encoding": "utf8x"}, "source.users.encoding='utf8x'"),
        (
            {"label__rule": "stars"},
            "source.label.rule (conf/dataset/x.yaml): Invalid value 'stars', expected one of "
            "['rating', 'column', 'clicks']",
        ),
        ({"label__threshold": None}, "source.label.threshold=None"),
        ({"label__rule": "column"}, "source.label.column=''"),
        ({"label__rule": "column", "label__column": "x", "label__liked": ["0"]}, "each text in one list"),
        ({"label__rule": "column", "label__column": "x", "label__liked": []}, "wanted some text in liked"),
        (
            {"faulty": "ignore"},
            "source.faulty (conf/dataset/x.yaml): Invalid value 'ignore', expected one of ['error', 'drop']",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_or_cannot_be_is_told_before_a_file_is_read(changes, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)) as error:
        config(**changes)
    assert "\n" not in str(error.value)
