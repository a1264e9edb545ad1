"""No CRM goes without the contract."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from recllm.crm.config import CrmName
from tests.crm.contract import VARIANTS


def test_every_crm_has_a_variant():
    assert {variant.partition("-")[0] for variant in VARIANTS} == set(get_args(CrmName))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_under_the_contract(variant):
    path = Path(__file__).with_name(f"test_{variant.partition('-')[0]}.py")
    assert re.search(rf'\((Crm|Model)Contract\):\n    variant = "{variant}"\n', path.read_text())
