"""On a CUDA device everything is what it is on the CPU, in float64 up to the order of sums. Passed over without one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.core import leaves, seeded
from pliant.learn import Learner, Life, bptt, immediate, prequential, trace
from pliant.measure.scores import Accuracy, Scores
from pliant.models import SequenceClassifier
from pliant.models.table import TableModel
from pliant.optim import adamw, warmup
from pliant.optim.keeping import KEEPERS, keeping
from pliant.recipes.checkup import Checkup
from pliant.streams import digits
from tests.learn.worlds import Signs, late
from tests.mixers.cases import CASES
from tests.streams.test_series import world

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE, ROUNDING = "cuda", 1e-9


def near(found: Tensor, expected: Tensor, most: float = ROUNDING) -> None:
    assert found.dtype == expected.dtype
    if not found.is_floating_point() and not found.is_complex():
        assert found.cpu().equal(expected)
        return
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert float((found.cpu() - expected).abs().max() if expected.numel() else 0.0) <= most * size


def results(module: Any, x: Tensor, reset: Tensor, mask: Tensor) -> list[Tensor]:
    """Outputs, the last state, and gradients by inputs and parameters."""
    x = x.clone().requires_grad_()
    y, state = module(x, reset=reset, mask=mask)
    ends = [leaf for _, leaf in leaves(state)]
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    outputs = [part for part in (y, *ends) if part.requires_grad]
    weights = [torch.linspace(-1, 1.5, part.numel()).reshape(part.shape).to(part) for part in outputs]
    gradients = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return [y.detach(), *(end.detach() for end in ends), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_mixer_is_the_same_there(case: Any) -> None:
    module = case.module(torch.float64)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, 21, case.features, generator=random, dtype=torch.float64)
    reset, mask = (torch.rand(3, 21, generator=random) < share for share in (0.1, 0.8))
    there = copy.deepcopy(module).to(DEVICE)
    moved = [part.to(DEVICE) for part in (x, reset, mask)]
    for found, expected in zip(results(there, *moved), results(module, x, reset, mask), strict=True):
        near(found, expected)
    with torch.no_grad():
        whole, last = there(moved[0])
        state = None
        for t in range(x.shape[1]):
            y, state = there.step(moved[0][:, t], state)
            near(y, whole[:, t].cpu())
        for (_, one), (_, other) in zip(leaves(state), leaves(last), strict=True):
            near(one, other.cpu())


def learner(stream: Any, rule: Any, device: str, names: Any = (), **options: Any) -> Learner:
    with seeded(3):
        model = SequenceClassifier(stream.spec.num_features, stream.spec.num_outputs, width=8, depth=2, **options)
        with torch.no_grad():
            model.head.linear.weight.normal_()
    model = model.double().to(device)
    optimizer = adamw(model, 1e-3)
    return Learner(model, optimizer, rule, keeping(names, model, optimizer, warmup(4)), streams=stream.spec.batch)


def lived(learner: Learner, stream: Any, scores: Any = None) -> list[Tensor]:
    scores = Scores(accuracy=Accuracy()) if scores is None else scores
    outputs = [learner.output for _ in prequential(stream, learner, scores)]
    return [*(y.cpu() for y in outputs if y is not None), *(p.detach().cpu() for p in learner.model.parameters())]


def alike(one: list[Tensor], other: list[Tensor]) -> None:
    for found, expected in zip(one, other, strict=True):
        near(found, expected, 1e-6)


RULES = {"bptt": bptt(8), "trace": trace(4), "immediate": immediate()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mixer", ["GatedLRU", "LRU"])
def test_a_learner_of_a_stream_on_the_cpu_learns_the_same_there(rule: str, mixer: str) -> None:
    def streams() -> Any:
        return late(Signs(40, steps=3))

    here, there = (lived(learner(streams(), RULES[rule], device, mixer=mixer), streams()) for device in ("cpu", DEVICE))
    alike(there, here)


@pytest.mark.parametrize("name", ["normalize-project", "rewarm", *KEEPERS])
def test_upkeep_is_the_same_there(name: Any) -> None:
    def life(device: str) -> list[Tensor]:
        stream = digits(batch=8, questions=30, seed=2)
        return lived(learner(stream, bptt(8), device, (name,), readout="mean"), stream)

    alike(life(DEVICE), life("cpu"))


@pytest.mark.parametrize("horizon", [0, 2])
def test_a_model_of_tables_is_the_same_there(horizon: int) -> None:
    def life(device: str) -> list[Tensor]:
        table = world(40, horizon=horizon, groups=2)
        stream = table.stream()
        with seeded(1):
            model = TableModel(table.source.columns, width=8, depth=2).double().to(device)
        ours = Learner(model, adamw(model, 1e-3), bptt(8), streams=2)
        return lived(ours, stream, _Nobody())

    alike(life(DEVICE), life("cpu"))


class _Nobody:
    def update(self, answer: Any, said: Any) -> None:
        pass


def test_a_life_may_go_on_elsewhere(tmp_path: Path) -> None:
    def life(device: str) -> Life:
        stream = late(Signs(40))
        return Life(learner=learner(stream, trace(4), device, ("replay", "ewc")), stream=stream,
                    scores=Scores(accuracy=Accuracy()))  # fmt: skip

    def on(life: Life, most: int) -> list[Tensor]:
        for turn, _ in enumerate(prequential(life.stream, life.learner, life.scores), 1):
            if turn == most:
                break
        return [p.detach().cpu() for p in life.learner.model.parameters()]

    first = life(DEVICE)
    on(first, 20)
    first.save(tmp_path / "lives")
    here, there = life("cpu"), life(DEVICE)
    for other in (here, there):
        other.load(tmp_path / "lives")
    last = on(first, 100)
    alike(on(here, 100), last)
    alike(on(there, 100), last)


def test_a_look_at_health_is_the_same_there() -> None:
    def found(device: str) -> Any:
        stream = digits(batch=8, questions=60, seed=2)
        ours, checkup = learner(stream, bptt(8), device, readout="mean"), Checkup()
        output = None
        while batch := stream.send(output):
            checkup.take(batch)
            for answer in batch.answers:
                ours.learn(answer)
            if batch.question is None:
                break
            output = ours.predict(batch.question)
        checkup.look(ours)
        return checkup.last

    one, other = found(DEVICE), found("cpu")
    assert flat(one.tables()) == pytest.approx(flat(other.tables()), rel=1e-5, abs=1e-7, nan_ok=True)


def flat(tables: Any, name: str = "") -> dict[str, Any]:
    """Numbers of nested tables by where they stand."""
    if isinstance(tables, (dict, list, tuple)):
        items = tables.items() if isinstance(tables, dict) else enumerate(tables)
        return {key: x for part, value in items for key, x in flat(value, f"{name}/{part}").items()}
    return {name: tables} if isinstance(tables, (int, float)) else {}
