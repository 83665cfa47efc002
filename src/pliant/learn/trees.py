"""Trees as opponents on streams of table rows: gradient boosting refitted now and then, and online trees of river."""

import math
from abc import abstractmethod
from collections import deque
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.core import Question, UsageError
from pliant.core.columns import Columns
from pliant.learn.references import Array, Frequencies, Note, RowByRow, Shares

TEMPERS = np.array([1.0, 0.5, 0.25])
"""Powers of a model's probabilities that are mixed, since trees are often too sure."""


@lru_cache(maxsize=1)
def _threads() -> Any:
    """The thread pools of this process; to find them takes milliseconds, and scikit-learn must be there."""
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController()


class _Model(RowByRow):
    """A model's answers made honest code lengths, by what is known of its past errors.

    Classes: the mixture of p^a / sum p^a for a in `TEMPERS` and the class frequencies so far, with shares
    by online EM over the same lag, so that a class the model has never seen keeps a probability.
    Numbers: a `ResidualDensity` around the model's value. For a forecast the model is about the
    difference to the last known label, since a tree cannot say what it has never seen and a level
    wanders; to regress, about the number itself. Where there is no model yet: the frequencies, or the
    last known label (forecast) or the level of the labels (regress), with errors counted apart.

    A tree has no memory of a stream, so beside the row and the newest known label it gets what our model
    keeps: the label that was known before that one (the newest, where that one is missing), and the group.

    Args:
        columns: the schema of the stream.
        remember: questions that may wait for an answer at the same time.
        groups: streams; with one alone there is no input that tells it.
    """

    kinds = 2

    def __init__(self, columns: Columns, remember: int = 128, groups: int = 1):
        super().__init__(columns, remember)
        self.frequencies = Frequencies(columns.num_outputs if self.classify else 0)
        self.shares = Shares.even(len(TEMPERS) + 1)
        self._last: dict[int, list[float]] = {}  # newest known label of each target, NaN if none
        self._before: dict[int, list[float]] = {}  # the same up to the last question, without that of its last step
        labels = 2 * len(columns.targets) if columns.label_as_input else 0
        self._grouped = groups > 1
        # Of the columns that the model may read.
        self._sizes = [column.size for column in columns.features] + [len(columns.classes)] * labels
        self._sizes += [groups] if self._grouped else []
        self._used = len(self._sizes)
        self._categories = [i for i, size in enumerate(self._sizes) if size]

    @abstractmethod
    def _take(self, x: Any, label: list[float]) -> None:
        """Learn what belonged to the row `x`: the class, or what to add to the base `(G,)`; NaN if unknown."""

    @abstractmethod
    def _model(self, seen: Any) -> tuple[Any, tuple[float, ...] | None]:
        """The row to remember and probabilities `(C,)` or numbers `(G,)`; None before there is a model."""

    def _look(self, inputs: Array, question: Question) -> Any:
        """The rows as the model reads them `(B, T, used)`."""
        features = len(self.columns.features)
        parts, rows = [inputs[..., :features]], question.rows.tolist()
        if self.columns.label_as_input:
            labels, resets = inputs[..., features:], question.reset.tolist()
            parts += [labels, np.empty_like(labels)]
            for b, row in enumerate(rows):
                kept = self._before.get(row, [math.nan] * labels.shape[2])
                for t, label in enumerate(labels[b].tolist()):
                    kept = [math.nan] * len(label) if resets[b][t] else kept
                    parts[2][b, t] = kept
                    kept = [new if new == new else old for new, old in zip(label, kept, strict=True)]
                self._before[row] = kept
        if self._grouped:
            parts.append(np.broadcast_to(np.array(rows, float)[:, None, None], (*inputs.shape[:2], 1)))
        return np.concatenate(parts, -1)

    def _forget(self, row: int) -> None:
        super()._forget(row)
        self._last.pop(row, None)

    def _learn(self, row: int, note: Note | None, label: list[float]) -> None:
        last = self._last.get(row)
        kept = [math.nan] * len(label) if last is None else last
        self._last[row] = [new if new == new else old for new, old in zip(label, kept, strict=True)]
        if self.classify:
            if label[0] == label[0]:
                self._learn_class(note, int(label[0]))
        else:
            self._learn_numbers(row, None if note is None else note[1], label)
        if note is not None:
            x, _, base = note
            apart = [value - start for value, start in zip(label, base, strict=True)]
            if any(map(math.isfinite, apart)):
                self._take(x, [value if math.isfinite(value) else math.nan for value in apart])

    def _learn_class(self, note: Note | None, label: int) -> None:
        if note is not None and note[1] is not None:
            experts = self._experts(note[1])
            self.shares.learn(experts[:, label])
        self.frequencies.learn(label)

    def _experts(self, probabilities: tuple[float, ...]) -> Array:
        powers = np.maximum(np.array(probabilities), 1e-9) ** TEMPERS[:, None]
        powers /= powers.sum(1, keepdims=True)
        return np.concatenate([powers, self.frequencies.probabilities()[None]])

    def _answer(self, row: int, seen: Any, place: Array) -> Note:
        x, said = self._model(seen)
        if self.classify:
            if said is None:
                place[:] = np.log(self.frequencies.probabilities())
            else:
                place[:] = np.log(self.shares.weights() @ self._experts(said))
            return x, said, (0.0,)
        leaning = self.columns.task == "forecast" and self.columns.label_as_input
        base = self._last[row] if leaning else [0.0] * len(place)
        guesses: list[tuple[int, float | None]] = []
        for g, start in enumerate(base):
            center = math.nan if said is None else start + said[g]
            if math.isfinite(center):
                guesses.append((1, center))
            elif leaning:
                guesses.append((0, start if start == start else None))
            else:
                density = self._densities_of(row)[g]
                guesses.append((0, density.level if density.labels else None))
        self._say_numbers(row, tuple(guesses), place)
        return x, tuple(guesses), tuple(base)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "frequencies": self.frequencies.state_dict(),
            "shares": self.shares.numbers(),
            "last": {row: list(label) for row, label in self._last.items()},
            "before": {row: list(label) for row, label in self._before.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.frequencies.load_state_dict(state["frequencies"])
        self.shares = Shares.of(state["shares"])
        self._last = {row: list(label) for row, label in state["last"].items()}
        if "before" not in state:
            raise UsageError(f"{type(self).__name__}: it was saved by a version with other inputs; begin a new run")
        self._before = {row: list(label) for row, label in state["before"].items()}


class Boosting(_Model):
    """Histogram gradient boosting of scikit-learn, fitted from scratch every `every` labels on the last `window`.

    Labels of all streams train one model (one per number). A fit that is due takes place before the next
    question, so all steps of a question see the same trees; other than for its siblings, how a stream
    is cut into questions matters that much. Missing values are the library's own; a category of more
    than 255 values is read as a number. Fits and predictions use one thread, so a fit is a function of
    its data and number, and a loaded one is fitted again rather than unpickled.

    Args:
        columns: the schema of the stream.
        every: known labels between fits.
        window: newest pairs of row and label that a fit sees.
        iterations: trees of a fit (per class, where there are more than two).
        seed: of the fits.
        remember: questions that may wait for an answer at the same time.
        groups: streams.
    """

    def __init__(
        self,
        columns: Columns,
        *,
        every: int = 1000,
        window: int = 5000,
        iterations: int = 100,
        seed: int = 0,
        remember: int = 128,
        groups: int = 1,
    ):
        super().__init__(columns, remember, groups)
        for name, value in (("every", every), ("window", window), ("iterations", iterations)):
            if value < 1:
                raise UsageError(f"Boosting: {name} is {value}, expected at least 1")
        from sklearn import ensemble

        self.every, self.window, self.iterations, self.seed = every, window, iterations, seed
        self.fits, self.labels = 0, 0
        self._makers = ensemble.HistGradientBoostingClassifier, ensemble.HistGradientBoostingRegressor
        self._pairs: deque[tuple[tuple[float, ...], list[float]]] = deque(maxlen=window)
        self._data: tuple[Array, Array] | None = None  # what the present models were fitted on
        self._models: list[Any] = []
        self._categories = [i for i in self._categories if self._sizes[i] <= 255]

    def predict(self, question: Question) -> Tensor:
        if self.labels // self.every > self.fits:
            self.fits = self.labels // self.every
            self._data = tuple(np.array(part) for part in zip(*self._pairs, strict=True))  # type: ignore[assignment]
            self._fit()
        return super().predict(question)

    def _fit(self) -> None:
        assert self._data is not None
        inputs, labels = self._data
        self._models = [self._fitted(inputs[~np.isnan(y)], y[~np.isnan(y)]) for y in labels.T]

    def _fitted(self, inputs: Array, labels: Array) -> Any:
        """A fitted model, the one value there is, or None if there is nothing to fit."""
        values = np.unique(labels)
        if len(values) < 2:
            return float(values[0]) if len(values) else None
        # The library refuses a column with no value at all; a constant one splits nothing, whatever comes later.
        inputs = np.where(np.isnan(inputs).all(0), 0.0, inputs)
        model = self._makers[0 if self.classify else 1](
            max_iter=self.iterations,
            categorical_features=self._categories or None,
            random_state=(self.seed + self.fits) % 2**32,
        )
        with _threads().limit(limits=1, user_api="openmp"):
            return model.fit(inputs, labels)

    def _look(self, inputs: Array, question: Question) -> Any:
        rows = super()._look(inputs, question).reshape(-1, self._used)
        said = self._outputs(rows).tolist() if self._models and len(rows) else [None] * len(rows)
        both = [(tuple(x), None if one is None else tuple(one)) for x, one in zip(rows.tolist(), said, strict=True)]
        steps = inputs.shape[1]
        return [both[b * steps : (b + 1) * steps] for b in range(len(inputs))]

    def _outputs(self, rows: Array) -> Array:
        """Probabilities `(n, C)` or numbers `(n, G)`, NaN where there is no model, of rows `(n, used)`."""
        with _threads().limit(limits=1, user_api="openmp"):
            if not self.classify:
                said = [
                    one.predict(rows) if hasattr(one, "predict") else np.full(len(rows), one, float)
                    for one in self._models
                ]
                return np.stack(said, 1)
            (model,), output = self._models, np.zeros((len(rows), self.columns.num_outputs))
            if hasattr(model, "predict"):
                output[:, model.classes_.astype(int)] = model.predict_proba(rows)
            else:
                output[:, int(model)] = 1.0
            return output

    def _model(self, seen: Any) -> tuple[Any, tuple[float, ...] | None]:
        x, said = seen
        return x, said

    def _take(self, x: Any, label: list[float]) -> None:
        self._pairs.append((x, label))
        self.labels += 1

    def state_dict(self) -> dict[str, Any]:
        pairs = [np.array(part, float) for part in zip(*self._pairs, strict=True)] if self._pairs else []
        return super().state_dict() | {
            "fits": self.fits,
            "labels": self.labels,
            "pairs": [torch.from_numpy(part) for part in pairs],
            "data": [torch.from_numpy(part) for part in self._data or ()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; takes as long as a fit."""
        super().load_state_dict(state)
        self.fits, self.labels, self._models, self._data = state["fits"], state["labels"], [], None
        self._pairs = deque(maxlen=self.window)
        if state["pairs"]:
            rows, labels = (part.tolist() for part in state["pairs"])
            self._pairs.extend((tuple(x), label) for x, label in zip(rows, labels, strict=True))
        if state["data"]:
            inputs, labels = (part.numpy().copy() for part in state["data"])
            self._data = inputs, labels
            self._fit()


class River(_Model):
    """Online trees of river: learns from every label, row by row.

    Features go in as a dict without the missing ones; codes of categories are nominal. To regress, the
    other numbers are standardized online first, since the leaves hold linear models.

    Args:
        columns: the schema of the stream.
        kind: `"hoeffding-adaptive-tree"` (Bifet & Gavaldà 2009) or `"adaptive-random-forest"` (Gomes et al. 2017),
            with river's own settings.
        seed: of the trees.
        trees: of the forest.
        remember: questions that may wait for an answer at the same time.
        groups: streams.

    Raises:
        UsageError: river is not installed.
    """

    resumable = False

    def __init__(
        self,
        columns: Columns,
        kind: str = "adaptive-random-forest",
        *,
        seed: int = 0,
        trees: int = 10,
        remember: int = 128,
        groups: int = 1,
    ):
        super().__init__(columns, remember, groups)
        try:
            from river import forest, preprocessing, tree
        except ImportError:
            raise UsageError(
                "River: the package river is not installed; run pip install river, or leave this opponent out"
            ) from None
        nominal = [str(i) for i in self._categories]
        if kind == "hoeffding-adaptive-tree":
            make: Any = tree.HoeffdingAdaptiveTreeClassifier if self.classify else tree.HoeffdingAdaptiveTreeRegressor
            options: dict[str, Any] = {}
        elif kind == "adaptive-random-forest":
            make = forest.ARFClassifier if self.classify else forest.ARFRegressor
            options = {"n_models": trees}
        else:
            raise UsageError(f"River: kind is {kind!r}, expected hoeffding-adaptive-tree or adaptive-random-forest")
        self.kind = kind
        self._trees: list[Any] = [
            make(seed=seed + g, nominal_attributes=nominal, **options) for g in range(len(columns.targets))
        ]
        self._scaler = None if self.classify else preprocessing.StandardScaler()
        self._learned = [False] * len(columns.targets)
        self._nominal = set(self._categories)

    def _model(self, seen: Any) -> tuple[Any, tuple[float, ...] | None]:
        x = tuple(seen.tolist())
        row = self._features(x)
        if self.classify:
            told = self._trees[0].predict_proba_one(row) if self._learned[0] else {}
            total = sum(told.values())
            if not 0 < total < math.inf:
                return x, None
            return x, tuple(told.get(c, 0.0) / total for c in range(self.columns.num_outputs))
        pairs = zip(self._trees, self._learned, strict=True)
        return x, tuple(float(one.predict_one(row)) if ready else math.nan for one, ready in pairs)

    def _features(self, x: tuple[float, ...]) -> dict[str, float]:
        if self._scaler is None:
            return {str(i): value for i, value in enumerate(x) if value == value}
        numbers = {str(i): value for i, value in enumerate(x) if value == value and i not in self._nominal}
        codes = {str(i): x[i] for i in self._categories if x[i] == x[i]}
        return self._scaler.transform_one(numbers) | codes

    def _take(self, x: Any, label: list[float]) -> None:
        if self._scaler is not None:
            self._scaler.learn_one({str(i): v for i, v in enumerate(x) if v == v and i not in self._nominal})
        row = self._features(x)
        for g, value in enumerate(label):
            if value == value:
                self._trees[g].learn_one(row, int(value) if self.classify else value)
                self._learned[g] = True

    def state_dict(self) -> dict[str, Any]:
        """Refuses.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "River: the trees of river cannot be saved without pickling, so this run cannot be resumed; leave "
            "this opponent out of a run that is saved"
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses, as `state_dict` does."""
        self.state_dict()
