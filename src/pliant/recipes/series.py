"""A small recurrent model learns your own table, row by row, beside what is done today."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from pliant import mixers
from pliant.core import UsageError, categorical_nats, seeded
from pliant.core.columns import Columns
from pliant.learn import Frozen, Learner, Life, Predictor, Retrained, rule_named
from pliant.learn.references import LastLabel, Marginal, Seasonal
from pliant.learn.rules import RuleName
from pliant.learn.trees import Boosting, River
from pliant.mixers import SequenceMixer
from pliant.models.classifier import check_mixer
from pliant.models.table import TableModel
from pliant.optim import adamw, inverse_sqrt
from pliant.optim.keeping import Keeper, check, keeping
from pliant.recipes.drive import Task
from pliant.recipes.panel import REFERENCE, Changes, Panel, Scoring, row_nats
from pliant.recipes.watch import Watched
from pliant.streams._named import named, replay
from pliant.streams._series import Series, Source
from pliant.streams._table import scan

COMMAND = "learn series"
REPLAY, REPLAY_SPEED = "replay:", 10.0
OF_TABLES = ("target", "task", "time", "features", "group", "concat", "season")
"""Options that a stream by name decides itself."""
MAX_WINDOW, MAX_CHUNK, MAX_SIZE = 4096, 4096, 16
LONG = 10_000
"""Rows from which chunks are longer: a short table has to be learned from few rows, so each counts more."""
SHORT_CHUNK, LONG_CHUNK = 8, 16
MIN_WINDOW, MAX_DEFAULT_WINDOW, CHUNKS_IN_WINDOW = 8, 32, 4
LR = 3e-3
WARMUP = 20
SCALE = 1000
"""Rows over which the learning rate begins to fall, see `inverse_sqrt`."""
FLOOR = 0.15
MAX_WAITING = 4096
"""Rows that may wait for their answers at the same time in a live stream, unless the delay asks for more."""
PASSES = 4
"""How often a training from scratch sees its window."""
TRAININGS = 25
"""Trainings from scratch in a run, unless --retrain says otherwise."""

Opponent = Literal[
    "plain", "majority", "mean", "no-change", "seasonal", "frozen", "retrained", "boosting", "hoeffding-tree",
    "adaptive-forest",
]  # fmt: skip
MixerName = Literal[
    "GatedLRU", "RGLRU", "LRU", "S6", "MultiScaleSSM", "MultiresConv", "MLSTM", "SLSTM", "GatedDelta",
]  # fmt: skip
"""Those that need nothing but a width."""
STANDARD: tuple[Opponent, ...] = (
    "plain",
    "majority",
    "mean",
    "no-change",
    "seasonal",
    "frozen",
    "retrained",
    "boosting",
)


@dataclass(frozen=True, kw_only=True)
class SeriesConfig:
    """What is learned, and by what. Two runs of one config over the same data are equal to the bit."""

    data: str | None = None
    """A table (.csv, .tsv, .txt, .jsonl, also as .gz, or .parquet), or a folder of them, each a group, read in order of
    time if each has one."""
    stream: str | None = None
    """Instead of a table, a stream by name: electricity, weather, outdoor or ett (with --data, the folder that holds
    it), river:NAME, aeon:NAME, regimes, drifting; replay:FILE is --data FILE at --speed."""
    speed: float | None = None
    """Rows per second at most, as if they came in now. Default: as fast as they are learned; for replay, 10."""
    target: tuple[str, ...] = ()
    """The column to predict, or several if they are numbers."""
    task: Literal["classify", "regress", "forecast", "auto"] = "auto"
    """What to predict: the class in the row, the number in the row, the number --horizon rows on. auto: forecast if
    --horizon is given; classify if the target has names or at most 20 whole numbers; else regress, or forecast if there
    is no other column."""
    horizon: int | None = None
    """Rows from the one that is asked to the value that it is asked for. Only to forecast; default 1."""
    delay: int = 0
    """Rows by which each label comes later than it could."""
    time: str | None = None
    """The column that holds the time; it must not go backwards. Default: found if it is plain to see."""
    features: tuple[str, ...] = ()
    """Columns to predict from. Default: all others."""
    group: str | None = None
    """The column that tells streams apart, such as a sensor or a customer."""
    concat: bool = False
    """Read the files of a folder as one stream, one after another in order of their names."""
    label_as_input: bool = True
    """Whether the newest known label is an input. Opponents that learn get the same inputs."""
    season: int | None = None
    """Rows after which a pattern repeats, such as 24 for hours. Default: from the times, if there are any."""
    rows: int | None = None
    """Stop after this many rows. Default: all of them."""
    chunk: int | None = None
    """Rows between two updates. What is answered is the same as row by row. Default: 16, or 8 for fewer
    than 10,000 rows."""
    size: int = 1
    """The one dial of the model: width = 32 size, depth = 2 (1 to 16)."""
    mixer: MixerName = "GatedLRU"
    """What the model mixes over time with; others cost more time, and some take fewer bits (docs/online.md)."""
    rule: RuleName = "bptt"
    """How far back an answer is learned from: bptt, over --window, again at each update; trace, over all the past, once
    and in constant memory; immediate, over the row itself (docs/rules.md)."""
    window: int | None = None
    """Rows that gradients reach back with bptt, and whose answers each update takes (1 to 4096). Default: four chunks,
    within 8 to 32, or one chunk."""
    lr: float | None = None
    """Learning rate of AdamW at its highest; it falls with the square root of time, down to a floor. Default: 0.003,
    less by square roots for a long --horizon, whose targets overlap, and for a --chunk below 8."""
    keep: tuple[Keeper, ...] = ()
    """Ways in which the learner is kept able to learn, as in --keep normalize-project,rewarm. Default: none."""
    tune: float | None = None
    """Minutes in which to choose --lr, --chunk and --size, as far as they are not given, by what they earn on the first
    fifth of the rows. Default: none, the defaults are used."""
    retrain: int | None = None
    """Rows between two trainings from scratch of the opponents that are retrained. Default: a 25th of the table."""
    opponents: tuple[Opponent, ...] = STANDARD
    """Who else answers; those that do not fit the task are left out, and no-change always answers. plain is the same
    learner without --keep."""
    seed: int = 0
    """Of the model and of everything else that is drawn."""

    def __post_init__(self) -> None:
        check(self.keep)
        check_mixer("learn series", self.mixer)
        if self.rule == "trace" and getattr(mixers, self.mixer).traceable is SequenceMixer.traceable:
            raise UsageError(
                f"--rule trace asks for a mixer with traces, which {self.mixer} has not; see docs/rules.md"
            )
        limits = {
            "horizon": (1, None), "delay": (0, None), "season": (1, None), "rows": (2, None), "retrain": (1, None),
            "chunk": (1, MAX_CHUNK), "size": (1, MAX_SIZE), "window": (1, MAX_WINDOW),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                span = f"{low} to {high}" if high is not None else f"at least {low}"
                raise UsageError(f"--{name} is {value}, expected {span}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise UsageError(f"--lr is {self.lr}, expected a number above 0")
        if self.tune is not None and not 0 < self.tune < float("inf"):
            raise UsageError(f"--tune is {self.tune}, expected a number of minutes above 0")
        if self.speed is not None and not self.speed > 0:
            raise UsageError(f"--speed is {self.speed}, expected rows per second above 0")
        if self.stream is not None:
            _check_stream(self, self.stream)


def _check_stream(config: SeriesConfig, stream: str) -> None:
    """Refuse options which that stream would pass over."""
    if stream.startswith(REPLAY):
        if not stream.removeprefix(REPLAY).strip():
            raise UsageError(f"--stream {REPLAY} names no file; give {REPLAY}FILE")
        if config.data is not None:
            raise UsageError(f"--stream {stream} says itself what is read; leave --data out")
        return
    for field in fields(config):
        if field.name in OF_TABLES and getattr(config, field.name) != field.default:
            raise UsageError(f"the stream {stream} has columns and a target of its own; leave --{field.name} out")


def source(config: SeriesConfig) -> Source:
    """The rows that a config names.

    Raises:
        UsageError: they cannot be read or cannot serve the task, or are so few that no label is known in time.
    """
    if config.stream is not None and config.stream.startswith(REPLAY):
        speed = config.speed or REPLAY_SPEED
        config = replace(config, stream=None, data=config.stream.removeprefix(REPLAY), speed=speed)
    rows = _source(config)
    _check_lag(config, rows)
    return rows if config.speed is None else replay(rows, speed=config.speed)


def _check_lag(config: SeriesConfig, rows: Source) -> None:
    longest = getattr(rows, "longest", rows.rows)  # rows of the largest group
    longest = longest if config.rows is None else min(longest, config.rows)
    if (lag := rows.columns.lag) < longest:
        return
    where = "the largest group ends" if rows.groups else "the rows end"
    raise UsageError(
        f"with --horizon and --delay as they are, the first label is known at row {lag + 1}, but {where} with row "
        f"{longest}, so that nothing could be learned; choose less of them or give more rows"
    )


def _source(config: SeriesConfig) -> Source:
    if config.stream is not None:
        return named(config.stream, config.data, horizon=config.horizon, delay=config.delay, seed=config.seed,
                     rows=config.rows, label_as_input=config.label_as_input)  # fmt: skip
    if config.data is None or not config.target:
        missing = "--data FILE" if config.data is None else "--target COLUMN"
        raise UsageError(
            f"learn series needs {missing}, as in: pliant learn series --data FILE --target COLUMN; or --stream NAME"
        )
    task = "forecast" if config.task == "auto" and config.horizon is not None else config.task
    return scan(
        config.data, task=task, target=config.target, features=config.features or None, group=config.group,
        time=config.time, horizon=config.horizon or 1, delay=config.delay, season=config.season,
        label_as_input=config.label_as_input, concat=config.concat,
    )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What a config leaves to the data, worked out.

    Attributes:
        chunk, window: rows.
        ahead: rows from a step to the value that it is asked for.
        remember: questions that may wait at the same time.
        rows: how many there are, None if nobody knows.
        retrain: rows.
        lr: highest learning rate.
    """

    chunk: int
    window: int
    ahead: int
    remember: int
    rows: int
    retrain: int
    lr: float

    @classmethod
    def of(cls, config: SeriesConfig, rows: Source) -> "Shape":
        columns, count = rows.columns, rows.rows if config.rows is None else min(rows.rows, config.rows)
        groups = max(1, len(rows.groups))
        chunk = config.chunk or (SHORT_CHUNK if count < LONG else LONG_CHUNK)
        ahead = columns.lag - config.delay if columns.task == "forecast" else 0
        # A question of several groups holds one step of each.
        steps = chunk if groups == 1 else 1
        several = max(MIN_WINDOW, min(MAX_DEFAULT_WINDOW, CHUNKS_IN_WINDOW * chunk))
        # With groups a question is one step of several, so that a window of so many holds more rows than that.
        window = config.window or (
            max(several, chunk) if groups == 1 else max(MIN_WINDOW, min(chunk, MAX_DEFAULT_WINDOW))
        )
        remember = -(-columns.lag // steps) + 2
        if groups > 1:
            remember = max(remember * groups, 4096)
        retrain = config.retrain or max(200, count // TRAININGS)
        # Updates from few rows are noisy, and targets that overlap say little new each.
        lr = config.lr or LR * min(1, chunk / SHORT_CHUNK) ** 0.5 / max(1, ahead) ** 0.5
        return cls(chunk, window, ahead, remember, count, retrain, lr)


def learner(
    config: SeriesConfig, columns: Columns, shape: Shape, streams: int, name: str = "model", *, live: bool = False
) -> Learner:
    """A learner for a stream of rows; `name` decides its first weights.

    With several streams or `live` questions are short, and an update takes as many answers as else a question has.
    """
    with seeded(config.seed, name):
        model = TableModel(columns, width=32 * config.size, mixer=config.mixer)
    optimizer = adamw(model, shape.lr)
    return Learner(
        model,
        optimizer,
        rule_named(
            config.rule, shape.window, shape.chunk, every=shape.chunk if live or streams > 1 else 1, revisit=True
        ),
        keeping(config.keep, model, optimizer, inverse_sqrt(WARMUP, SCALE / shape.chunk, FLOOR)),
        streams=streams,
        remember=max(MAX_WAITING, shape.remember * shape.chunk) if live else shape.remember,
        seed=config.seed,
    )


def task(config: SeriesConfig) -> Task:
    """What drives a run of `config`; reads over the data once, for what its columns mean."""
    rows = source(config)
    columns, shape = rows.columns, Shape.of(config, rows)
    title = f"{columns.task} {', '.join(columns.targets)}"
    notes = getattr(rows, "notes", ())
    schema = {"columns": columns.to_dict(), "groups": list(rows.groups), "rows": rows.rows, "shape": asdict(shape),
              "time": getattr(rows, "time", None), "group": getattr(rows, "group", None)}  # fmt: skip
    main = "accuracy" if columns.task == "classify" else "error"
    row = min(5000, max(50, shape.rows // 200))
    return Task(lambda: life(config, rows), title, shape.rows, main, row, None, notes, schema)


def life(config: SeriesConfig, rows: Source) -> Life:
    """The whole run as a life: learner, stream, and the panel of opponents with all scores."""
    columns, shape = rows.columns, Shape.of(config, rows)
    series = Series(rows, chunk=shape.chunk, ahead=shape.ahead, limit=config.rows)
    ours = learner(config, columns, shape, series.streams)
    opponents = _opponents(config, series, shape, ours)
    numbers = columns.task != "classify"
    scoring = Scoring(numbers, "group" if rows.groups else None, rows.groups)
    changes = Changes(row_nats if numbers else categorical_nats)
    return Life(learner=ours, stream=Watched(series, columns), panel=Panel(ours, opponents, scoring, changes))


def _opponents(config: SeriesConfig, series: Series, shape: Shape, ours: Learner) -> dict[str, Predictor]:
    columns, keep = series.columns, {"remember": shape.remember}
    numbers = columns.task != "classify"
    trees: dict[str, Any] = {"seed": config.seed, "groups": series.streams, **keep}
    plain = replace(config, keep=())
    makers: dict[str, Any] = {
        "mean" if numbers else "majority": lambda: Marginal(columns, **keep),
        "no-change": lambda: LastLabel(columns, **keep),
        "frozen": lambda: Frozen(ours, after=shape.rows // 5),
        "retrained": lambda: Retrained(
            lambda number: learner(plain, columns, shape, series.streams, f"retrained/{number}"),
            every=shape.retrain, window=5 * shape.retrain, passes=PASSES,
        ),
        "boosting": lambda: Boosting(columns, every=shape.retrain, window=5 * shape.retrain, **trees),
        "hoeffding-tree": lambda: River(columns, "hoeffding-adaptive-tree", **trees),
        "adaptive-forest": lambda: River(columns, "adaptive-random-forest", **trees),
    }  # fmt: skip
    if config.keep:
        makers["plain"] = lambda: learner(plain, columns, shape, series.streams)
    if columns.season is not None:
        makers["seasonal"] = lambda: Seasonal(columns, **keep)
    wanted = dict.fromkeys([*config.opponents, REFERENCE])
    return {name: makers[name]() for name in wanted if name in makers}
