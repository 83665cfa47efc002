"""Texts under models of language: scores of each token, of models of ours and of transformers; and logs of lm-eval.

A document is read from a fresh start, after a token that begins it, so that its first token is scored, too. Tokens are
counted with the bytes of the text that they stand for, which is what models with other tokenizers share.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pliant.core import Disk, UsageError, seeded
from pliant.measure.perplexity import TokenScores
from pliant.mixers import FullAttention
from pliant.models import ByteTokenizer, LanguageModel

PIECE = 2048
"""Bytes of text in a document, where a file is one text."""
CHUNK, ROWS = 256, 16
"""Steps of a model of ours at a time, and documents beside each other."""
WINDOW = 2048
"""Tokens that a model of transformers sees at a time; what is longer is cut there."""
Tell = Callable[[int, int], None]
"""Told how many documents of how many are done."""


def documents(paths: Sequence[Path], piece: int = PIECE, limit: int | None = None) -> list[str]:
    """Texts of files: each line's `text` of a .jsonl, any other file cut at line ends after every `piece` bytes.

    Raises:
        UsageError: a file cannot be read, is not UTF-8, or holds no text.
    """
    found: list[str] = []
    for path in paths:
        raw = read_text(path)
        found += _lines(path, raw) if path.suffix == ".jsonl" else list(pieces(raw, piece))
    if limit is not None:
        found = found[:limit]
    if not found:
        raise UsageError(f"{', '.join(map(str, paths))} holds no text")
    return found


def read_text(path: Path) -> str:
    """A file of UTF-8, less its byte order mark.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"{path} cannot be read as text ({why})") from None


def _lines(path: Path, raw: str) -> list[str]:
    found = []
    for number, line in enumerate(raw.split("\n"), 1):  # other ends of lines may stand within a text
        try:
            text = json.loads(line)["text"] if line.strip() else ""
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError):  # one is half of a surrogate pair
            text = None
        if not isinstance(text, str):
            raise UsageError(f'{path}, line {number}: expected an object with a "text"')
        found += [text] if text else []
    return found


def pieces(raw: str, piece: int) -> Iterator[str]:
    """Lines together until they have `piece` bytes."""
    held, size = "", 0
    for line in raw.splitlines(keepends=True):
        held, size = held + line, size + len(line.encode())
        if size >= piece:
            yield held
            held, size = "", 0
    if held:
        yield held


def score_model(path: Path, texts: Sequence[str], tell: Tell = lambda done, of: None) -> TokenScores:
    """Scores of each token of the texts, under a saved model.

    Args:
        path: folder of a `LanguageModel` over bytes by save_pretrained, or of a causal language model of transformers
            with its tokenizer; or a .gguf file, for transformers.
        texts: the documents.
        tell: of progress.

    Raises:
        UsageError: there is no such model, or it cannot be read.
    """
    model, tokenizer = read_model(path)
    if tokenizer is None:
        return score_ours(model, texts, tell)
    return score_transformers(model, tokenizer, texts, tell)


def read_model(path: Path) -> tuple[Any, Any]:
    """A saved model and its tokenizer, which is None for one of ours: its tokens are bytes. As for `score_model`."""
    if not path.exists():
        raise UsageError(f"{path} is not there; give the folder of a model by save_pretrained, or a .gguf file")
    config = _config(path)
    if "num_tokens" in config and "model_type" not in config:
        return _ours(path), None
    return _transformers(path)


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        found = None
    if path.suffix == ".gguf":
        return {}
    if not isinstance(found, dict):
        raise UsageError(f"{path} has no readable config.json; give the folder of a model by save_pretrained")
    return found


def _ours(path: Path) -> LanguageModel:
    try:
        # It says on standard output that it loads, and draws weights before it has them.
        with seeded(0), redirect_stdout(io.StringIO()):
            model = LanguageModel.from_pretrained(path)
    except Exception as error:
        raise UsageError(f"{path} holds a LanguageModel that cannot be read ({error})".split("\n")[0]) from None
    if model.num_tokens != ByteTokenizer.num_tokens:
        raise UsageError(f"{path} has {model.num_tokens} tokens; a model of text has {ByteTokenizer.num_tokens}, the "
                         "bytes and the start of a document")  # fmt: skip
    return model.eval()


def room_of(model: Any) -> int | None:
    """Tokens that a model can see at most; None if it goes on for ever."""
    parts = model.modules() if isinstance(model, torch.nn.Module) else ()
    rooms = [part.kept for part in parts if isinstance(part, FullAttention)]
    if positions := getattr(getattr(model, "config", None), "max_position_embeddings", None):
        rooms.append(int(positions))
    return min(rooms, default=None)


@torch.no_grad()
def score_ours(model: LanguageModel, texts: Sequence[str], tell: Tell = lambda done, of: None) -> TokenScores:
    """Of a model of ours over bytes: some documents beside each other, with their memory carried through each.

    Windows of a document that is longer than the model has room for stand alone.
    """
    scores, tokenizer = TokenScores(), ByteTokenizer()
    room = room_of(model)
    chunk = CHUNK if room is None else min(CHUNK, room)
    for first in range(0, len(texts), ROWS):
        rows = [tokenizer.encode(text) for text in texts[first : first + ROWS]]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        numbers = torch.arange(first, first + len(rows))[:, None]
        state = None
        for start in range(0, padded.shape[1] - 1, chunk):
            if room is not None and start % (room - room % chunk) == 0:
                state = None
            inputs, targets = padded[:, start : start + chunk], padded[:, start + 1 : start + chunk + 1]
            inputs, exists = inputs[:, : targets.shape[1]], targets >= 0
            logits, state = model(inputs, state, mask=exists)
            position = torch.arange(start, start + targets.shape[1])
            scores.update(logits, targets, mask=exists, document=numbers, position=position, num_bytes=1)
        tell(first + len(rows), len(texts))
    return scores


def _transformers(path: Path) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UsageError(f"{path} needs transformers; pip install 'pliant[text]'") from None
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    where: tuple[Path, dict[str, Any]] = (path, {})
    if path.suffix == ".gguf":
        where = path.parent, {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where[0], local_files_only=True, **where[1])
        model = AutoModelForCausalLM.from_pretrained(where[0], local_files_only=True, dtype="auto", **where[1])
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        raise UsageError(f"{path} holds no causal language model that transformers can read ({why})") from None
    return model.eval(), tokenizer


@torch.no_grad()
def score_transformers(
    model: Any, tokenizer: Any, texts: Sequence[str], tell: Tell = lambda done, of: None
) -> TokenScores:
    """Of a causal language model of transformers, one document at a time; windows of what is longer stand alone.

    The first token of a window is predicted from the one before it, that of a document from the token that begins
    texts, else from the one that ends them (as lm-eval does).

    Raises:
        UsageError: the tokenizer has neither, or does not tell where its tokens stand.
    """
    begin = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if begin is None or not tokenizer.is_fast:
        raise UsageError("this tokenizer has no token to begin a text with, or does not tell where its tokens stand; "
                         "use a fast one that has")  # fmt: skip
    window = min(WINDOW, room_of(model) or WINDOW)
    scores = TokenScores()
    for number, text in enumerate(texts):
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = torch.tensor([begin, *made["input_ids"]], device=model.device)
        sizes = torch.tensor(_bytes_of(text, made["offset_mapping"]))
        for start in range(0, len(tokens) - 1, window):
            inputs, targets = tokens[start : start + window], tokens[start + 1 : start + window + 1]
            logits = model(input_ids=inputs[None, : len(targets)], use_cache=False).logits[0]
            position = torch.arange(start, start + len(targets))
            size = sizes[start : start + len(targets)]
            scores.update(logits, targets, document=number, position=position, num_bytes=size.to(targets.device))
        tell(number + 1, len(texts))
    return scores


def _bytes_of(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Bytes that each token stands for, from where it begins and ends in the text; together those of the text.

    Where several tokens make one letter, the first has its bytes; what no token stands for belongs to the next.
    """
    found, end = [], 0
    for index, (_, stop) in enumerate(spans):
        stop = len(text) if index == len(spans) - 1 else max(stop, end)
        found.append(len(text[end:stop].encode()))
        end = stop
    return found


# Scores on disk


def save_scores(scores: TokenScores, path: Path) -> None:
    """Into a .safetensors file, for `load_scores`."""
    state = scores.state_dict()
    tensors = {name: state[name].contiguous() for name in ("sums", "bins")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {f"columns.{name}": x.contiguous() for name, x in scores.columns().items()}
        Disk().replace_file(path, save(tensors | columns))
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error})") from None


def load_scores(path: Path) -> TokenScores:
    """What `save_scores` wrote; or a log of lm-eval, samples_TASK_DATE.jsonl, or a folder with such logs.

    Raises:
        UsageError: the file is none of these, or not whole.
    """
    if path.is_dir():
        logs = sorted(path.glob("samples_*.jsonl"))
        if not logs:
            raise UsageError(f"{path} holds no log of lm-eval (samples_TASK_DATE.jsonl, of --log_samples)")
        scores = TokenScores()
        for log in logs:
            scores = scores.merge(_log(log))
        return scores
    if path.suffix != ".safetensors":
        return _log(path)
    scores = TokenScores()
    try:
        tensors = load_file(path)
        columns = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith("columns.")}
        scores.load_state_dict({"sums": tensors["sums"], "bins": tensors["bins"], "columns": columns})
    except Exception as error:
        raise UsageError(f"{path} holds no scores of pliant measure perplexity ({error})".split("\n")[0]) from None
    return scores


def _log(path: Path) -> TokenScores:
    """Each sample of a log of lm-eval as one answer: a choice of several, or a continuation that is greedy or not."""
    task = path.stem.rpartition("_")[0] or path.stem
    rows: dict[int, list[Tensor]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
            document = _code(task, sample["doc_id"])
            # One row per filter that was used: the first counts.
            if document not in rows:
                rows[document] = [*_answer(sample), torch.tensor(_code(sample.get("doc_hash"), sample["target"]))]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UsageError(
                f"{path}, line {number}: expected a sample of lm-eval with log-likelihoods of its choices or of its "
                "continuation; generated answers and rolling ones have none that can be right"
            ) from None
    if not rows:
        raise UsageError(f"{path} holds no samples")
    nll, right, confidence, entropy, brier, size, target = (torch.stack(x) for x in zip(*rows.values(), strict=True))
    scores = TokenScores()
    scores.add(nll, right, confidence=confidence, entropy=entropy, brier=brier, document=torch.tensor(list(rows)),
               target=target, num_bytes=size)  # fmt: skip
    return scores


def _answer(sample: dict[str, Any]) -> list[Tensor]:
    """nll, right, confidence, entropy, brier, bytes of a sample; numbers stand in it as text."""
    pairs = [response[0] if isinstance(response[0], list) else response for response in sample["filtered_resps"]]
    if "acc_mutual_info" in sample:  # then the choices stand there once more, without the question
        pairs = pairs[: len(pairs) // 2]
    lengths = torch.tensor([float(pair[0]) for pair in pairs], dtype=torch.float64)
    greedy = [str(pair[1]) == "True" for pair in pairs]
    texts = [sample["arguments"][f"gen_args_{i}"]["arg_1"] for i in range(len(pairs))]
    unknown = torch.tensor(torch.nan, dtype=torch.float64)
    if len(pairs) == 1:
        size = torch.tensor(len(texts[0].encode()))
        return [-lengths[0], torch.tensor(greedy[0]), unknown, unknown, unknown, size]
    best = int(lengths.argmax())
    target = _target(str(sample["target"]), texts, best, sample.get("acc"))
    logs = lengths.log_softmax(-1)
    shares = logs.exp()
    truth = torch.nn.functional.one_hot(torch.tensor(target), len(pairs))
    # Among choices code lengths are not those of the text, so no bytes belong to them.
    return [-logs[target], torch.tensor(best == target), shares.max(), torch.special.entr(shares).sum(),
            (shares - truth).square().sum(), torch.tensor(0)]  # fmt: skip


def _target(said: str, texts: Sequence[str], best: int, accuracy: float | None) -> int:
    """Which choice is meant, by its number or by its text; if it may be either, that which fits the accuracy."""
    found = [int(said)] if said.isdecimal() and int(said) < len(texts) else []
    found += [i for i, text in enumerate(texts) if text.strip() == said.strip()]
    fits = [i for i in found if accuracy is None or (i == best) == (accuracy == 1)]
    return fits[0]


def _code(*parts: Any) -> int:
    """A number that stands for the parts, 63 bits."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "little") >> 1
