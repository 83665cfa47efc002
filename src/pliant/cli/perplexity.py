"""`pliant measure perplexity`: whether perplexity picks the model that is right."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

from pliant.cli.arguments import Misuse, parse, require
from pliant.cli.figure import check_folder, draw_to


@dataclasses.dataclass(frozen=True)
class PerplexityOptions:
    """Whether perplexity picks the model that is right, over texts or logged tasks.

    A table, what a difference of perplexity is made of, and for each pair one of: agree; perplexity picks the less
    accurate model; confidence only; unresolved.
    """

    models: tuple[Path, ...]
    """Folders of models by save_pretrained: LanguageModel of pliant, or causal language models of transformers with
    their tokenizer; or .gguf files. They need --text."""
    text: tuple[Path, ...] = ()
    """Texts to score: .jsonl with a "text" in each line, or text files, which are cut into pieces."""
    scores: tuple[Path, ...] = ()
    """Models that were scored before: files that --save wrote, logs of lm-eval (samples_TASK_DATE.jsonl), or folders
    of such logs."""
    piece: int = 2048
    """Bytes of a text file that make one document; documents are what is resampled."""
    limit: int | None = None
    """Documents to score at most; default: all."""
    save: Path | None = None
    """A folder for the scores of each model, NAME.safetensors."""
    figure: Path | None = None
    """An SVG file for the iso-perplexity figure."""
    seed: int = 0
    """Of the bootstrap."""
    json: bool = False
    """Print everything as JSON."""


def command(arguments: list[str]) -> int:
    """The exit code of `pliant measure perplexity` with these arguments."""
    what = ("pliant measure perplexity needs two models and a text, such as: pliant measure perplexity ONE OTHER "
            "--text FILE; or two files with --scores")  # fmt: skip
    require(arguments, what)
    import tyro

    kind = Annotated[PerplexityOptions, tyro.conf.arg(name="")]
    options = parse(kind, arguments, "pliant measure perplexity", None, positional=("models",))
    if len(options.models) + len(options.scores) < 2:
        raise Misuse(what)
    if bool(options.models) != bool(options.text):
        raise Misuse("pliant measure perplexity: models need --text FILE, and --text needs models")
    if options.save is not None and not options.models:
        raise Misuse("pliant measure perplexity: --save keeps scores of models; those of --scores are kept already")
    if options.piece < 1 or (options.limit is not None and options.limit < 1):
        raise Misuse(
            f"pliant measure perplexity: --piece {options.piece} and --limit {options.limit} must be at least 1"
        )
    from pliant.core.plain import dumps
    from pliant.recipes.contest import contest

    check_folder(options.figure)
    found = contest(_scores(options), seed=options.seed)
    print(dumps(found.found()) if options.json else "\n".join(found.lines()), flush=True)
    draw_to(options.figure, found.svg)
    if options.figure is not None and (left := found.undrawn()):
        print(f"not in the figure: {', '.join(left)}", file=sys.stderr)
    return 0


def _scores(options: PerplexityOptions) -> dict[str, Any]:
    """Scores of each model by its name."""
    from pliant.recipes.language import documents, load_scores, save_scores, score_model

    paths = [*options.models, *options.scores]
    names = _names(paths)
    found = {names[path]: load_scores(path) for path in options.scores}
    texts = documents(options.text, options.piece, options.limit) if options.models else []
    made = {}
    for path in options.models:
        made[names[path]] = score_model(path, texts, _progress(names[path]))
        if options.save is not None:
            save_scores(made[names[path]], options.save / f"{names[path]}.safetensors")
    return made | found


def _names(paths: list[Path]) -> dict[Path, str]:
    """The last part of each path that tells it from the others."""
    if len(set(paths)) < len(paths):
        raise Misuse("pliant measure perplexity: the same model or file is given twice")
    for depth in (1, 2, 3):
        names = {path: "-".join((*path.resolve().parts[-depth:-1], _stem(path))) for path in paths}
        if len(set(names.values())) == len(paths):
            return names
    return {path: str(path).replace("/", "-") for path in paths}


def _stem(path: Path) -> str:
    return path.stem if path.suffix in (".jsonl", ".safetensors", ".gguf") else path.resolve().name


def _progress(name: str) -> Any:
    told = [-1]

    def tell(done: int, of: int) -> None:
        if (tenth := 10 * done // of) > told[0]:
            told[0] = tenth
            print(f"{name}: {done:,} of {of:,} documents", file=sys.stderr, flush=True)

    return tell
