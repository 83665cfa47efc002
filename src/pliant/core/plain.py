"""Values as JSON that every reader takes."""

import json
import math
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text in which null stands for NaN and infinity, for which JSON has no numbers (RFC 8259, section 6)."""
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
