"""The code in docs/plasticity.md runs and holds."""

import re
from pathlib import Path
from typing import Any

import pytest


def test_the_code_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plasticity.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert names["both"].plasticity == pytest.approx(2.8877123795, abs=1e-9)
