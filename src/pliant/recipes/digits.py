"""A small recurrent model reads handwritten digits while the task keeps changing.

permute   the pixels are reordered: everything about the images must be learned again
relabel   the classes are renamed: only the read-out must be learned again
random    a fixed subset with a random class per image, drawn anew: nothing can be learned but the
          images themselves, and only revisits can be answered (the memorization task of
          Lyle et al. 2023, arXiv:2303.01486, and others)
"""

from dataclasses import dataclass, replace
from typing import Literal

from pliant.core import UsageError
from pliant.core.seeds import seeded
from pliant.learn import Frozen, Learner, Life, Majority, NoChange, Predictor, Retrained, rule_named
from pliant.learn.rules import RuleName
from pliant.models import SequenceClassifier
from pliant.models.classifier import MAX_SIZE
from pliant.optim import adamw, warmup, warmup_cosine
from pliant.optim.keeping import Keeper, check, keeping
from pliant.recipes.drive import Task
from pliant.recipes.panel import REFERENCE, Panel, Scoring
from pliant.streams import Stream, digits, drift

COMMAND = "learn digits"
IMAGES = 1797
MAX_WINDOW = 4096
VISITS_PER_TASK = 8
WARMUP = 50
AGAIN = warmup_cosine(5, 150, floor=0.3)
"""Of the rate with --keep rewarm, by updates since the loss rose."""
RETRAIN_PASSES = 4

Opponent = Literal["plain", "majority", "no-change", "frozen", "retrained"]


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """What is learned, and by what. Two runs of one config are equal to the bit."""

    change: Literal["permute", "relabel", "random"] = "permute"
    """What changes from task to task: order of the pixels, names of the classes, or a random class per image."""
    every: int = 4000
    """Answers per task."""
    by: Literal["row", "pixel"] = "row"
    """How an image is read: 8 steps of 8 pixels, or 64 steps of one."""
    answers: int = 40_000
    """Answers in the whole run."""
    forever: bool = False
    """Go on after --answers, until stopped; opponents are frozen and compared as if the run had that length."""
    batch: int = 16
    """Images per question; each question brings one update."""
    delay: int = 0
    """Questions by which each answer comes later."""
    size: int = 2
    """The one dial of the model: depth = size, width = 32 size (1 to 16)."""
    rule: RuleName = "bptt"
    """How far back an answer is learned from: bptt, over --window; trace, over all the past, in constant memory;
    immediate, over the step itself (docs/rules.md)."""
    window: int = 64
    """Steps that gradients reach back with bptt (1 to 4096)."""
    lr: float = 3e-3
    """Learning rate of AdamW."""
    keep: tuple[Keeper, ...] = ("normalize-project", "isometry", "toward-init")
    """Ways in which the learner is kept able to learn or to retain, as in --keep isometry,toward-init; none if left
    empty."""
    retrain: int = 2000
    """Answers between two trainings from scratch of the opponent that is retrained, and their sliding window."""
    opponents: tuple[Opponent, ...] = ("plain", "majority", "no-change", "frozen", "retrained")
    """Who else answers: plain is the same learner without --keep, if it has any; no-change is always there, since
    bits are counted against it."""
    seed: int = 0
    """Of the stream, the model and everything else."""

    def __post_init__(self) -> None:
        check(self.keep)
        for name in ("every", "answers", "batch", "retrain"):
            _check(name, getattr(self, name), 1, None)
        _check("delay", self.delay, 0, None)
        _check("size", self.size, 1, MAX_SIZE)
        _check("window", self.window, 1, MAX_WINDOW)
        if not 0 < self.lr < float("inf"):
            raise UsageError(f"--lr is {self.lr}, expected a number above 0")

    @property
    def questions(self) -> int | None:
        return None if self.forever else -(-self.answers // self.batch)


def _check(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        span = f"{low} to {high}" if high is not None else f"at least {low}"
        raise UsageError(f"--{name} is {value}, expected {span}")


def stream(config: DigitsConfig) -> Stream:
    """The changing stream of a config."""
    # A random task shows each image so many times that memorizing it can pay.
    images = IMAGES if config.change != "random" else min(IMAGES, max(config.batch, config.every // VISITS_PER_TASK))
    source = digits(by=config.by, batch=config.batch, questions=config.questions, images=images, seed=config.seed)
    match config.change:
        case "permute":
            changing = drift.permute(source, every=config.every, seed=config.seed)
        case "relabel":
            changing = drift.relabel(source, every=config.every, seed=config.seed)
        case "random":
            changing = drift.redraw(source, every=config.every, items=images, seed=config.seed)
        case _:
            raise UsageError(f"--change is {config.change!r}, expected permute, relabel or random")
    changing = drift.visits(changing, items=images)
    return drift.delay(changing, questions=config.delay) if config.delay else changing


def learner(config: DigitsConfig, source: Stream, name: str = "model") -> Learner:
    """A learner for the stream `source`; `name` decides its first weights."""
    with seeded(config.seed, name):
        model = SequenceClassifier.sized(config.size, source.spec.num_features, source.spec.num_outputs, readout="mean")
    optimizer = adamw(model, config.lr)
    return Learner(
        model,
        optimizer,
        rule_named(config.rule, config.window, source.spec.steps),
        # Joint gains take fewer bits than free ones here, and more on tables (docs/defaults.md).
        keeping(config.keep, model, optimizer, warmup(WARMUP), again=AGAIN, gains="joint"),
        streams=source.spec.batch,
        remember=config.delay + 2,
        seed=config.seed,
    )


def task(config: DigitsConfig) -> Task:
    """What drives a run of `config`."""
    total = None if config.forever else config.answers
    title = f"change={config.change}, every={config.every}"
    return Task(lambda: life(config), title, total, every=config.every)


def life(config: DigitsConfig) -> Life:
    """The whole run as a life: learner, stream, and the panel of opponents with all scores."""
    source = stream(config)
    ours = learner(config, source)
    plain = replace(config, keep=())
    classes, remember = source.spec.num_outputs, config.delay + 2
    makers = {
        "plain": lambda: learner(plain, source),
        "majority": lambda: Majority(classes, remember),
        "no-change": lambda: NoChange(classes, remember),
        "frozen": lambda: Frozen(ours, after=config.answers // 5),
        "retrained": lambda: Retrained(
            lambda number: learner(plain, source, f"retrained/{number}"),
            every=config.retrain,
            window=config.retrain,
            passes=RETRAIN_PASSES,
        ),
    }
    wanted = dict.fromkeys([*(name for name in config.opponents if name != "plain" or config.keep), REFERENCE])
    opponents: dict[str, Predictor] = {name: make() for name, make in makers.items() if name in wanted}
    return Life(learner=ours, stream=source, panel=Panel(ours, opponents, Scoring(by="visit", names=drift.VISITS)))
