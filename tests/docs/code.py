"""The code in the pages of docs, run as it stands there."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def names_of(page: str, **given: Any) -> dict[str, Any]:
    """What the code of a page of ours has defined in the end; `given` is there before it."""
    names: dict[str, Any] = dict(given)
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(code, names)
    return names
