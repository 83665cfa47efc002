"""What torch.compile and torch.export make of every mixer and model, in a process that the type checks do not reach.

python -m tests.compiling CHECK,CHECK BACKEND [NAME ...]    # one line of JSON per case: name, and what failed or null
"""

import io
import json
import sys
import traceback
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pliant.core import leaves
from tests.mixers.cases import CASES as MIXERS
from tests.models.cases import CASES as MODELS
from tests.suite import Case

LENGTHS = (9, 12, 33)
CASES = {case.name: case for case in MIXERS + MODELS}


def sequence(case: Case, steps: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, steps, case.features, generator=torch.Generator().manual_seed(steps))


def flags(steps: int, batch: int = 3) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(steps)
    return {name: torch.rand(batch, steps, generator=random) < 0.3 for name in ("reset", "mask")}


def close(one: Any, two: Any, error: float = 1e-4) -> None:
    for (name, a), (other, b) in zip(leaves(one), leaves(two), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, atol=error, rtol=error)


def compiles(case: Case, backend: str) -> None:
    """One graph, one compilation for all lengths, outputs and gradients as without."""
    module = case.module()
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = False
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for given in (lambda steps: {}, flags):
        for turn, steps in enumerate(LENGTHS):
            x = sequence(case, steps)
            torch._dynamo.mark_dynamic(x, 1)
            more = given(steps)
            for flag in more.values():
                torch._dynamo.mark_dynamic(flag, 1)
            torch._dynamo.config.error_on_recompile = turn > 0
            found = []
            for run in (compiled, module):
                module.zero_grad()
                y, state = run(x, **more)
                y.sum().backward()
                gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
                found.append((y.detach(), state, gradients))
            (y, state, gradients), expected = found
            close(y, expected[0])
            close(state, expected[1])
            assert gradients.keys() == expected[2].keys()
            for name, gradient in expected[2].items():
                scale = float(gradient.abs().max()) + 1
                torch.testing.assert_close(gradients[name] / scale, gradient / scale, atol=1e-4, rtol=1e-4)
    torch._dynamo.config.error_on_recompile = False
    with torch.no_grad():
        _, state = module(sequence(case, 5))
        for _ in range(2):
            x = sequence(case, 1)
            close(compiled(x, state), module(x, state))
            _, state = module(x, state)


def exports(case: Case, backend: str) -> None:
    """A sequence and a step, from a state and with flags, are plain programs that survive a file."""
    module = case.module().eval()
    with torch.no_grad():
        _, state = module(sequence(case, 5))
        for steps in (6, 1):
            x, more = sequence(case, steps), flags(steps)
            program = torch.export.export(module, (x, state), more)
            own = {str(node.target) for node in program.graph.nodes if "pliant" in str(node.target)}
            assert steps > 1 or not own, f"a step is not plain torch: {own}"
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            loaded = torch.export.load(file).module()
            x = x + 1
            close(loaded(x, state, **more), module(x, state, **more))


def narrow(case: Case, backend: str) -> None:
    """bf16 autocast: near float32, finite gradients, wide states."""
    module, x = case.module(), sequence(case, 12)
    expected = module(x)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = module(x)
    assert all(leaf.dtype.itemsize >= 4 for _, leaf in leaves(state) if leaf.is_floating_point())
    error = float((y.float() - expected).detach().norm() / expected.norm())
    assert error < 0.1, f"off by {error:.3g}"
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in module.parameters() if p.grad is not None)


class Calls(TorchDispatchMode):
    """The first call of each of our operators, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "pliant":
            copied = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
            self.found.setdefault(function, tuple(copied))
        return function(*args, **(kwargs or {}))


def operators(case: Case, backend: str) -> list[str]:
    """torch.library.opcheck of every operator that a pass calls."""
    module, calls = case.module(), Calls()
    for more in ({}, flags(9)):
        with calls:
            module(sequence(case, 9).requires_grad_(case in MIXERS), **more)[0].sum().backward()
        for function, args in calls.found.items():
            backward = "backward" in str(function)
            given = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and not backward else x
                     for x in args]  # fmt: skip
            torch.library.opcheck(function, tuple(given))
    return sorted(str(function) for function in calls.found)


CHECKS = {"compile": compiles, "export": exports, "autocast": narrow, "operators": operators}


def main() -> None:
    checks, backend, *names = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names or CASES:
        failed, found = None, None
        try:
            for check in checks.split(","):
                found = CHECKS[check](CASES[name], backend)
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
            failed = f"{check}: {type(error).__name__}: {error}\n{where}"
        print(json.dumps({"name": name, "failed": failed, "found": found}), flush=True)


if __name__ == "__main__":
    main()
