"""MS-SSM on digits: what is left out of which arm, what the judge makes of results, and the gate of the dossier."""

import pytest
import torch

from pliant.core import seeded
from pliant.recipes.ms_ssm import ARMS, BANK, FULL, MS_SSM, TABLES, Net, data, judge, run, trials
from pliant.recipes.reproduce import Result, Trial

BARE = f"{BANK}, static weights, nothing past the states"


def net(name: str) -> Net:
    with seeded(0):
        return Net(**ARMS[name])


def reach(one: Net) -> int:
    """Steps back that reach the last one by filters alone, with no state."""
    x = torch.zeros(1, 64, 32)
    layer = one.layers[0]
    with torch.no_grad():
        if not layer.mixer.selective:
            layer.mixer.read.zero_()
        J = torch.autograd.functional.jacobian(lambda x: layer(x)[0, -1].sum(), x + 0.1)
    return 64 - int(J[0].abs().sum(1).nonzero()[0])


def test_arms_leave_out_what_they_say() -> None:
    nets = {name: net(name) for name in ARMS}
    assert set(TABLES) < set(ARMS)
    assert reach(nets[FULL]) == 22 and reach(nets[BANK]) == 4
    bare = nets["no recurrence"].layers[0].mixer
    assert not bare.read.any() and not bare.read.requires_grad
    bare = nets[BARE].layers[0].mixer
    assert not bare.skip.any() and not bare.skip.requires_grad and bare.weights.kind == "static"
    states = {name: one.layers[0].mixer.log_rate.shape[:2].numel() for name, one in nets.items()}
    assert set(states.values()) == {20}
    for name, one in nets.items():
        assert one(data(0)[0][:3]).shape == (3, 10), name


def test_pictures_are_split_by_seed() -> None:
    x, y, held, classes = data(1)
    assert x.shape == (1437, 64, 1) and held.shape == (360, 64, 1) and len(y) == 1437 and len(classes) == 360
    assert float(x.min()) == -1 and float(x.max()) == 1
    assert not torch.equal(data(2)[2], held)


def results(**accuracy: float) -> list[tuple[Trial, Result]]:
    base = dict.fromkeys(ARMS, 0.8) | accuracy
    return [(trial, {"accuracy": base[trial.name] + 0.001 * trial.seed}) for trial in trials("ten")]


def test_the_judge_tells_directions_and_no_more() -> None:
    assert len(trials("ten")) == 45 and len(trials("minute")) == 2
    good = judge(results(**{FULL: 0.9, BANK: 0.3, "static weights": 0.7, "no recurrence": 0.85}))
    assert [claim.verdict for claim in good] == 6 * ["direction only"]
    assert good[-1].ours == "60.0, 20.0, 5.0 points"
    bad = judge(results(**{FULL: 0.8, BANK: 0.3}))
    assert [claim.verdict for claim in bad] == ["not reproduced", "direction only", *4 * ["not reproduced"]]
    assert [claim.seeds for claim in judge([row for row in results() if row[0] in trials("minute")])] == [1]


@pytest.mark.slow
def test_check_15_the_bank_is_what_it_takes() -> None:
    """At most 0.6 without it, as the dossier has it, takes a net without weights from the input and a direct path."""
    whole, without = (run(trial, lambda *_: None)["accuracy"] for trial in MS_SSM.trials("minute"))
    assert whole >= 0.8
    assert without <= whole - 0.08
    assert run(Trial(BARE, ARMS[BARE], 0), lambda *_: None)["accuracy"] <= 0.6
