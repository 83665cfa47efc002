"""Scores: merging, closed forms, invariances, and parity with scikit-learn."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from torch import Tensor

from pliant.core import Answer, UsageError, mixture_nats
from pliant.core.pack import differences, pack, unpack
from pliant.measure.scores import (
    AbsoluteError,
    Accuracy,
    Bits,
    Brier,
    Calibration,
    Grouped,
    Kappa,
    Scores,
    TemporalKappa,
    bits_saved,
)

CLASSES, ROWS = 4, 3
CLASS_SCORES: dict[str, Callable[[], Any]] = {
    "bits": Bits,
    "accuracy": Accuracy,
    "brier": Brier,
    "calibration": Calibration,
    "calibration, four bins": lambda: Calibration(bins=4),
    "kappa": Kappa,
    "temporal kappa": TemporalKappa,
}
NUMBER_SCORES: dict[str, Callable[[], Any]] = {
    "absolute error": AbsoluteError,
    "bits of a density": lambda: Bits(mixture_nats),
}
ALL = CLASS_SCORES | NUMBER_SCORES
every_score = pytest.mark.parametrize("name", ALL)

Said = tuple[Answer, Tensor | None]


def parts(name: str, count: int = 6, seed: int = 0, kind: type = float) -> list[Said]:
    """Answers about three rows and four steps each, some targets hidden, and what was said."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for time in range(count):
        shown = torch.rand(ROWS, 4, generator=random) < 0.7
        if name in NUMBER_SCORES:
            targets: Tensor = torch.randn(ROWS, 4, generator=random, dtype=torch.float64)
            said = torch.randn(ROWS, 4, 6, generator=random, dtype=torch.float64)
        else:
            targets = torch.randint(CLASSES, (ROWS, 4), generator=random)
            said = 2 * torch.randn(ROWS, 4, CLASSES, generator=random, dtype=torch.float64)
            said = said + 2 * torch.nn.functional.one_hot(targets, CLASSES)
        tags = {"visit": torch.randint(3, (ROWS, 4), generator=random), "task": time // 2}
        rows = torch.randperm(ROWS, generator=random)
        found.append((Answer(targets, shown, shown, time, rows, tags=tags), said))
    return found


def scored(score: Any, said: list[Said]) -> Any:
    for answer, output in said:
        score.update(answer, output)
    return score


def flat(said: list[Said]) -> tuple[Tensor, Tensor]:
    """All revealed outputs and targets, in order."""
    outputs = torch.cat([output[answer.target_mask] for answer, output in said])
    return outputs, torch.cat([answer.targets[answer.target_mask] for answer, _ in said])


def values(score: Any) -> Any:
    return score.value()


@every_score
@given(cuts=st.lists(st.integers(0, 6), max_size=3), seed=st.integers(0, 99), forgotten=st.sets(st.integers(0, 5)))
def test_merging_parts_is_one_pass(name: str, cuts: list[int], seed: int, forgotten: set[int]) -> None:
    said, make = parts(name, seed=seed), ALL[name]
    said = [(answer, None if i in forgotten else output) for i, (answer, output) in enumerate(said)]
    edges = [0, *sorted(cuts), 6]
    pieces = [scored(make(), said[a:b]) for a, b in pairwise(edges)]
    whole, merged = scored(make(), said), pieces[0]
    for piece in pieces[1:]:
        before = copy.deepcopy((merged.state_dict(), piece.state_dict()))
        both = merged.merge(piece)
        assert differences(before, (merged.state_dict(), piece.state_dict())) == []
        merged = both
    from_behind = pieces[-1]
    for piece in reversed(pieces[:-1]):
        from_behind = piece.merge(from_behind)
    assert from_behind.value() == pytest.approx(merged.value(), rel=1e-12, nan_ok=True)
    assert merged.value() == pytest.approx(whole.value(), rel=1e-12, nan_ok=True)
    assert (merged.count, merged.missed) == (whole.count, whole.missed)


@every_score
def test_nothing_scored_is_nan_with_a_reason_and_never_zero(name: str) -> None:
    score = ALL[name]()
    assert math.isnan(score.value())
    assert score.reason()
    ((answer, output),) = parts(name, 1)
    score.update(answer._replace(target_mask=torch.zeros_like(answer.target_mask)), output)
    assert math.isnan(score.value())
    score.update(answer, output)
    assert score.reason() is None


@every_score
def test_a_state_survives_a_file_to_the_bit(name: str) -> None:
    said = parts(name)
    score, other = scored(ALL[name](), said[:3]), ALL[name]()
    other.load_state_dict(unpack(*pack(score.state_dict())))
    assert differences(scored(other, said[3:]).state_dict(), scored(score, said[3:]).state_dict()) == []
    assert other.value() == score.value()


@every_score
def test_hidden_targets_and_their_outputs_do_not_count(name: str) -> None:
    said = parts(name)
    altered = []
    for answer, output in said:
        hidden = ~answer.target_mask
        targets = torch.where(hidden, torch.full_like(answer.targets, -7), answer.targets)
        altered.append((answer._replace(targets=targets), torch.where(hidden[..., None], math.nan, output)))
    assert scored(ALL[name](), altered).value() == scored(ALL[name](), said).value()


@every_score
def test_inputs_stay_and_a_fresh_score_is_empty(name: str) -> None:
    said = parts(name)
    before = copy.deepcopy([(tuple(a), o) for a, o in said])
    score = scored(ALL[name](), said)
    assert differences(before, [(tuple(a), o) for a, o in said]) == []
    assert math.isnan(score.fresh().value())
    assert differences(score.fresh().state_dict(), ALL[name]().state_dict()) == []


@every_score
def test_a_forgotten_question_is_missed_and_counts_in_no_value(name: str) -> None:
    said = parts(name)
    score = scored(ALL[name](), said)
    value = score.value()
    score.update(said[0][0], None)
    assert score.value() == value
    assert score.missed == int(said[0][0].target_mask.sum())


@every_score
def test_no_steps_and_no_rows_are_fine(name: str) -> None:
    ((answer, output),) = parts(name, 1)
    shown = answer.target_mask
    for cut in ((slice(None), slice(0)), (slice(0), slice(None))):
        score = ALL[name]()
        less = answer._replace(
            targets=answer.targets[cut], target_mask=shown[cut], learn_mask=shown[cut], rows=answer.rows[cut[0]]
        )
        score.update(less, output[cut])
        score.update(less, None)
        assert math.isnan(score.value())
        assert (score.count, score.missed) == (0, 0)


@every_score
def test_gradients_of_an_output_are_let_go(name: str) -> None:
    said = parts(name)
    held = [(answer, output.clone().requires_grad_()) for answer, output in said]
    score = scored(ALL[name](), held)
    tensors = [part for part in score.state_dict().values() if isinstance(part, Tensor)]
    assert tensors
    assert not any(tensor.requires_grad for tensor in tensors)
    assert score.value() == scored(ALL[name](), said).value()


@every_score
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_output_is_scored_as_the_same_numbers_in_float32(name: str, dtype: torch.dtype) -> None:
    narrow = [(answer, output.to(dtype)) for answer, output in parts(name)]
    wide = [(answer, output.float()) for answer, output in narrow]
    assert scored(ALL[name](), narrow).value() == scored(ALL[name](), wide).value()


@every_score
def test_scores_of_another_kind_are_not_merged(name: str) -> None:
    other = Brier() if name != "brier" else Accuracy()
    with pytest.raises(UsageError, match="merge scores of one kind"):
        ALL[name]().merge(other)


# Parity


def test_bits_accuracy_brier_and_kappa_are_those_of_scikit_learn() -> None:
    said = parts("bits", 30)
    outputs, targets = flat(said)
    probabilities, best = outputs.softmax(-1).numpy(), outputs.argmax(-1).numpy()
    labels = list(range(CLASSES))
    expected = {
        "bits": metrics.log_loss(targets.numpy(), probabilities, labels=labels) / math.log(2),
        "accuracy": metrics.accuracy_score(targets.numpy(), best),
        "brier": metrics.brier_score_loss(targets.numpy(), probabilities, labels=labels, scale_by_half=False),
        "kappa": metrics.cohen_kappa_score(targets.numpy(), best),
    }
    for name, value in expected.items():
        assert scored(ALL[name](), said).value() == pytest.approx(value, rel=1e-9), name
    bits = scored(Bits(), said)
    assert bits.total() == pytest.approx(bits.value() * bits.count)


def test_absolute_error_is_that_of_scikit_learn() -> None:
    said = parts("absolute error", 10)
    outputs, targets = flat(said)
    weights, means, _ = outputs.chunk(3, -1)
    points = (weights.softmax(-1) * means).sum(-1)
    expected = metrics.mean_absolute_error(targets.numpy(), points.numpy())
    assert scored(AbsoluteError(), said).value() == pytest.approx(expected)
    own = scored(AbsoluteError(point=lambda output: output[..., 0]), said).value()
    assert own == pytest.approx(metrics.mean_absolute_error(targets.numpy(), outputs[:, 0].numpy()))


def test_bits_of_a_density_are_those_of_a_mixture_in_torch() -> None:
    said = parts("bits of a density", 5)
    outputs, targets = flat(said)
    weights, means, log_scales = outputs.chunk(3, -1)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=weights), torch.distributions.Normal(means, log_scales.exp())
    )
    expected = float(-mixture.log_prob(targets).mean()) / math.log(2)
    assert scored(Bits(mixture_nats), said).value() == pytest.approx(expected)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_is_the_gap_between_confidence_and_accuracy(bins: int) -> None:
    said = parts("calibration", 20)
    outputs, targets = flat(said)
    confidence, best = outputs.softmax(-1).max(-1)
    where = (confidence * bins).long().clamp(max=bins - 1)
    gap = 0.0
    for b in range(bins):
        inside = where == b
        if inside.any():
            right = (best == targets)[inside].double().mean()
            gap += float(inside.double().mean() * (confidence[inside].mean() - right).abs())
    score = scored(Calibration(bins), said)
    assert score.value() == pytest.approx(gap)
    table = score.table()
    assert sum(row["count"] for row in table) == len(targets)
    assert sum(row["count"] * row["accuracy"] for row in table) == pytest.approx(float((best == targets).sum()))


@pytest.mark.parametrize("forgotten", [set(), {0, 3, 4}])
def test_temporal_kappa_compares_with_the_last_label_of_the_same_stream(forgotten: set[int]) -> None:
    said = parts("temporal kappa", 12)
    said = [(answer, None if i in forgotten else output) for i, (answer, output) in enumerate(said)]
    last: dict[int, int] = {}
    compared = right = stayed = 0
    for answer, output in said:
        for r, row in enumerate(answer.rows.tolist()):
            for t in range(4):
                if not answer.target_mask[r, t]:
                    continue
                label = int(answer.targets[r, t])
                if row in last and output is not None:
                    compared += 1
                    right += int(output[r, t].argmax()) == label
                    stayed += last[row] == label
                last[row] = label
    expected = (right / compared - stayed / compared) / (1 - stayed / compared)
    assert scored(TemporalKappa(), said).value() == pytest.approx(expected)


# Closed forms and invariances


@pytest.mark.parametrize("name", ["bits", "accuracy", "brier", "kappa", "calibration", "temporal kappa"])
def test_renaming_the_classes_changes_no_score(name: str) -> None:
    order = torch.tensor([2, 0, 3, 1])
    said = parts(name)
    renamed = [(a._replace(targets=order[a.targets]), torch.empty_like(o).index_copy(-1, order, o)) for a, o in said]
    assert scored(ALL[name](), renamed).value() == pytest.approx(scored(ALL[name](), said).value())


@pytest.mark.parametrize("name", ["bits", "accuracy", "brier", "calibration"])
def test_adding_a_constant_to_logits_changes_no_score(name: str) -> None:
    said = parts(name)
    moved = [(answer, output + 7) for answer, output in said]
    assert scored(ALL[name](), moved).value() == pytest.approx(scored(ALL[name](), said).value())


def one(targets: list[int], said: Tensor) -> Said:
    shown = torch.ones(1, len(targets), dtype=torch.bool)
    return Answer(torch.tensor([targets]), shown, shown, 0, torch.zeros(1, dtype=torch.int64)), said[None]


def test_the_uniform_guess_costs_log2_of_the_classes() -> None:
    assert scored(Bits(), [one([0, 1, 2, 3], torch.zeros(4, 4))]).value() == pytest.approx(2)
    assert scored(Brier(), [one([0, 1, 2, 3], torch.zeros(4, 4))]).value() == pytest.approx(0.75)


def test_certainty_is_free_when_right_and_infinite_when_wrong() -> None:
    certain = torch.tensor([[0.0, -math.inf]])
    assert scored(Bits(), [one([0], certain)]).value() == 0
    assert scored(Bits(), [one([1], certain)]).value() == math.inf


@every_score
@pytest.mark.parametrize("merged", [False, True])
def test_an_output_that_is_not_a_number_makes_the_value_so(name: str, merged: bool) -> None:
    said = parts(name)
    broken = (said[-1][0], torch.full_like(said[-1][1], math.nan))
    if merged:
        score = scored(ALL[name](), said[:-1]).merge(scored(ALL[name](), [broken])).merge(ALL[name]())
    else:
        score = scored(ALL[name](), [*said[:-1], broken])
    assert math.isnan(score.value())
    assert "NaN" in score.reason()
    assert score.count == scored(ALL[name](), said).count


def test_a_target_that_is_not_a_number_makes_the_error_so() -> None:
    ((answer, output),) = parts("absolute error", 1)
    assert math.isnan(scored(AbsoluteError(), [(answer._replace(targets=answer.targets * math.nan), output)]).value())


def test_why_there_is_no_value_names_the_case() -> None:
    first, same = one([0], torch.eye(2)[:1]), one([0, 0], torch.eye(2)[[0, 0]])
    assert "no answers yet that follow" in scored(TemporalKappa(), [first]).reason()
    assert "never changed" in scored(TemporalKappa(), [same]).reason()
    assert "one class" in scored(Kappa(), [same]).reason()


def test_kappa_of_one_class_only_cannot_be_told() -> None:
    assert math.isnan(scored(Kappa(), [one([0, 0], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))]).value())


def test_kappa_grows_with_the_classes_it_meets() -> None:
    two, three = one([0, 1], torch.eye(2)), one([0, 2], torch.eye(3)[[0, 2]])
    assert scored(Kappa(), [two, three]).value() == 1
    assert scored(Kappa(), [three, two]).value() == 1
    assert scored(Kappa(), [two]).merge(scored(Kappa(), [three])).value() == 1


# Collections


def test_groups_are_scores_of_their_part() -> None:
    said = parts("bits")
    grouped = scored(Grouped(Bits(), by="visit"), said)
    outputs, targets = flat(said)
    tags = torch.cat([answer.tags["visit"][answer.target_mask] for answer, _ in said])
    for value, found in grouped.value().items():
        expected = metrics.log_loss(
            targets[tags == value].numpy(), outputs[tags == value].softmax(-1).numpy(), labels=list(range(CLASSES))
        )
        assert found == pytest.approx(expected / math.log(2))
    by_task = scored(Grouped(Accuracy(), by="task"), said)
    assert list(by_task.value()) == [0, 1, 2]
    halves = scored(Grouped(Bits(), by="visit"), said[:2]).merge(scored(Grouped(Bits(), by="visit"), said[2:]))
    assert halves.value() == pytest.approx(grouped.value())
    other = grouped.fresh()
    other.load_state_dict(unpack(*pack(grouped.state_dict())))
    assert other.value() == grouped.value()
    assert scored(Grouped(Bits(), by="no such tag"), said).value() == {}


def test_a_collection_is_its_scores() -> None:
    said = parts("bits")
    both = scored(Scores(bits=Bits(), visit=Grouped(Accuracy(), by="visit")), said)
    assert both.value()["bits"] == scored(Bits(), said).value()
    other = both.fresh()
    assert math.isnan(other.value()["bits"])
    other.load_state_dict(unpack(*pack(both.state_dict())))
    assert other.value() == both.value()
    assert both.merge(both)["bits"].count == 2 * both["bits"].count


def test_bits_saved_are_a_difference_over_the_same_answers() -> None:
    said = parts("bits")
    ours = scored(Bits(), said)
    uniform = scored(Bits(), [(answer, 0 * output) for answer, output in said])
    assert bits_saved(uniform, ours) == pytest.approx(2 * ours.count - ours.total())
    with pytest.raises(UsageError, match="same answers"):
        bits_saved(uniform, scored(Bits(), said[:2]))


def test_what_does_not_fit_is_refused() -> None:
    answer, output = one([0, 5], torch.zeros(2, 3))
    with pytest.raises(UsageError, match=r"0 to 5.*3 classes"):
        Bits().update(answer, output)
    with pytest.raises(UsageError, match="give what was said"):
        Bits().update(answer, output[:, :1])
    with pytest.raises(UsageError, match="give what was said"):
        Bits().update(answer._replace(targets=answer.targets[:, :1]), output)
    with pytest.raises(UsageError, match=r"bins is 0"):
        Calibration(bins=0)
    with pytest.raises(UsageError, match=r"bins=4.*bins=1"):
        Calibration(bins=1).merge(Calibration(bins=4))


@pytest.mark.parametrize("name", [name for name in CLASS_SCORES if "four" not in name])
def test_targets_that_are_not_one_class_are_refused(name: str) -> None:
    answer, output = one([0, 1], torch.zeros(2, 3))
    with pytest.raises(UsageError, match="one int class"):
        ALL[name]().update(answer._replace(targets=answer.targets.double()), output)
    many = answer._replace(targets=answer.targets[..., None].expand(1, 2, 5))
    with pytest.raises(UsageError, match="one int class"):
        ALL[name]().update(many, output[:, :, None].expand(1, 2, 5, 3))
    narrow = scored(ALL[name](), [(answer._replace(targets=answer.targets.int()), output)])
    assert differences(narrow.state_dict(), scored(ALL[name](), [(answer, output)]).state_dict()) == []


def test_shapes_that_would_broadcast_are_refused() -> None:
    answer, output = one([0, 1], torch.zeros(2, 1))
    with pytest.raises(UsageError, match=r"\(2, 1\) came for 2 answers, expected \(2,\)"):
        AbsoluteError(point=lambda out: out).update(answer, output)
    numbers = answer._replace(targets=torch.zeros(1, 2, 1))
    with pytest.raises(UsageError, match=r"\(2, 2\) came for 2 answers"):
        Bits(mixture_nats).update(numbers, torch.zeros(1, 2, 3))


def test_whole_numbers_are_targets_of_an_absolute_error() -> None:
    answer, output = one([7, 1], torch.zeros(2, 1))
    assert scored(AbsoluteError(point=lambda out: out[..., 0]), [(answer, output)]).value() == 4


@pytest.mark.parametrize("tag", ["spring", 0.5, torch.tensor([0]), torch.zeros(1, 2)])
def test_a_tag_that_numbers_no_places_is_refused(tag: Any) -> None:
    answer, output = one([0, 1], torch.zeros(2, 3))
    with pytest.raises(UsageError, match="number the values"):
        Grouped(Bits(), by="visit").update(answer._replace(tags={"visit": tag}), output)


def test_collections_that_differ_are_not_joined() -> None:
    with pytest.raises(UsageError, match="same names"):
        Scores(a=Bits()).merge(Scores(b=Bits()))
    with pytest.raises(UsageError, match="same names"):
        Scores(a=Bits()).load_state_dict(Scores(a=Bits(), b=Bits()).state_dict())
    with pytest.raises(UsageError, match="one tag"):
        Grouped(Bits(), by="visit").merge(Grouped(Bits(), by="task"))
    with pytest.raises(UsageError, match="one kind"):
        Grouped(Bits(), by="visit").merge(Grouped(Brier(), by="visit"))
