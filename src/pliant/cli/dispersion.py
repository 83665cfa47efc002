"""`pliant measure dispersion`: how sharp the heads of a model are on a text, and how long they can be."""

import dataclasses
from pathlib import Path
from typing import Annotated

from pliant.cli.arguments import Misuse, parse, require
from pliant.cli.figure import check_folder, draw_to


@dataclasses.dataclass(frozen=True)
class DispersionOptions:
    """How the attention of a model disperses on a text as more is visible, head by head.

    A row for each head: how far its logits lie apart, the share of its top key in short and in long rows, the entropy
    of the longest, and the number of keys from which on no key can hold the share that is asked about.
    """

    model: Path
    """Folder of a model by save_pretrained: LanguageModel of pliant with attention, or a causal language model of
    transformers with its tokenizer; or a .gguf file."""
    text: Path | None = None
    """A text file, of which the beginning is read; needed."""
    tokens: int = 1024
    """Tokens of the text, at most."""
    share: float = 0.5
    """The share of a key that counts as sharp, of 1."""
    figure: Path | None = None
    """An SVG file to draw to: the top share of every head against the keys that are visible."""
    json: bool = False
    """Print everything as JSON."""


def command(arguments: list[str]) -> int:
    """The exit code of `pliant measure dispersion` with these arguments."""
    what = "pliant measure dispersion needs a model and a text, such as: pliant measure dispersion MODEL --text FILE"
    require(arguments, what)
    import tyro

    kind = Annotated[DispersionOptions, tyro.conf.arg(name="")]
    options = parse(kind, arguments, "pliant measure dispersion", None, positional=("model",))
    if options.text is None:
        raise Misuse(what)
    if options.tokens < 2 or not 0 < options.share <= 1:
        raise Misuse(
            f"pliant measure dispersion: --tokens {options.tokens} and --share {options.share:g}, expected at least 2 "
            "tokens and a share above 0 and at most 1"
        )
    from pliant.core.plain import dumps
    from pliant.measure.dispersion import table, verdict
    from pliant.recipes.heads import heads_on

    check_folder(options.figure)
    found = heads_on(options.model, options.text, options.tokens, options.share)
    if options.figure is not None:
        from pliant.report.dispersion import draw

        draw_to(options.figure, lambda: draw(found))
    said = verdict(found, options.share)
    if options.json:
        print(dumps({"verdict": said, "share": options.share, "heads": [head._asdict() for head in found]}))
    else:
        print("\n".join([*table(found, options.share), "", said]))
    return 0
