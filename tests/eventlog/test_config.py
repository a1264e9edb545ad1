import pytest

from recllm.eventlog.config import PrepareConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"split": "first"},
            "prepare.split=first is not usable; wanted one of time, last, user, items, random",
        ),
        ({"shares": [0.8]}, r"prepare.shares=\[0.8\] is not usable; wanted two shares"),
        ({"shares": [0.9, 0.1]}, "leave some for the test split"),
        ({"shares": [0.9, -0.1]}, "two shares above 0"),
        ({"held_items": [0.1]}, r"prepare.held_items=\[0.1\] is not usable; wanted two shares"),
        ({"held_items": [0.5, 0.5]}, "leave some items for training"),
        ({"last_n": 0}, "wanted 1 or more samples"),
        ({"ties": "none"}, "prepare.ties=none is not usable; wanted one of rows, strict"),
        ({"min_history": -1}, "wanted 0 or more events"),
        ({"sampled_negatives": -1}, "wanted 0 or more items"),
        ({"sampled_by": "hard"}, "wanted one of uniform, popular"),
        ({"candidates": 1}, "wanted 2 or more items"),
        ({"category": "mood"}, "wanted one of item_fields"),
    ],
)
def test_config_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**change)
