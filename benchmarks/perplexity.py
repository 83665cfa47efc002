"""Scores of a million tokens in constant memory, exact at any size of logits; and docs/perplexity.md with its figures.

python benchmarks/perplexity.py stream [FILE]   # a million tokens of a vocabulary of 50,000; about five minutes
python benchmarks/perplexity.py exact           # against float64, at gaps of 10,000 between logits in float32
python benchmarks/perplexity.py take FOLDER     # a finished run of pliant reproduce perplexity, into docs/results
python benchmarks/perplexity.py page            # draw docs/perplexity.md and its figures again
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _ledger import append

from pliant.core import generator
from pliant.measure.perplexity import TokenScores
from pliant.measure.token_scores import token_statistics

TOKENS, VOCABULARY, CHUNK, RANK = 1_000_000, 50_000, 250, 16


def resident() -> float:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096.0


def stream(file: Path | None) -> dict[str, Any]:
    """Logits that a head of 16 features makes, a chunk at a time; the most memory in each tenth."""
    torch.set_num_threads(1)
    random = generator(0, "stream")
    head = torch.randn(RANK, VOCABULARY, generator=random)
    found: dict[str, Any] = {"tokens": TOKENS, "vocabulary": VOCABULARY}
    scores, expected, spent, most = TokenScores(keep=False), 0.0, 0.0, [0.0] * 10
    for start in range(0, TOKENS, CHUNK):
        features = torch.randn(CHUNK, RANK, generator=random)
        targets = torch.randint(VOCABULARY, (CHUNK,), generator=random)
        logits = features @ head
        began = time.process_time()
        scores.update(logits, targets)
        spent += time.process_time() - began
        if start % (TOKENS // 100) == 0:  # a hundredth of it once more, in float64
            expected += float(-logits.double().log_softmax(-1).gather(1, targets[:, None]).sum())
            found["checked"] = found.get("checked", 0) + CHUNK
        tenth = 10 * start // TOKENS
        most[tenth] = max(most[tenth], resident())
    found |= {"mean_nats": scores.value().nll, "scored": scores.value().tokens,
              "mean_nats_of_a_sample_in_float64": expected / found["checked"],
              "microseconds_a_token": 1e6 * spent / TOKENS, "cpu_seconds": spent,
              "mib_at_most_by_tenth": [size / 2**20 for size in most]}  # fmt: skip
    if file is not None:
        file.write_text(json.dumps(found) + "\n")
    return found


def tell_stream(found: dict[str, Any]) -> None:
    shown = ("scored", "vocabulary", "mib_at_most_by_tenth", "microseconds_a_token", "mean_nats")
    scores, most = TokenScores(keep=False), found["mib_at_most_by_tenth"]
    state = sum(part.nbytes for part in (scores.sums, scores.bins))
    append("A million tokens of a vocabulary of 50,000 are scored in constant memory",
           "python benchmarks/perplexity.py stream",
           {name: found[name] for name in shown} | {"bytes_of_scores": state},
           holds=found["scored"] == TOKENS and most[-1] - most[1] < 1,
           note="at most 1 MiB more in the last tenth than in the second; an earlier line compares with the first "
                "hundredth: 26 MiB, where 8 had been allowed; chunks that the allocator kept")  # fmt: skip


def exact() -> None:
    """Two logits a gap apart among 49,998 that are lower, in float32; the same in float64 by log-sum-exp."""
    random = generator(0, "exact")
    worst: dict[float, float] = {}
    naive = {}
    for gap in (1.0, 100.0, 1e4):
        logits = torch.randn(200, VOCABULARY, generator=random)
        targets = torch.randint(VOCABULARY, (200,), generator=random)
        peak = (targets + 1) % VOCABULARY
        logits.scatter_(1, peak[:, None], logits.gather(1, targets[:, None]) + gap)
        reference = -logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        worst[gap] = float(((token_statistics(logits, targets).nll - reference) / reference).abs().max())
        naive[gap] = float(-logits.softmax(-1).gather(1, targets[:, None]).log().mean())
    far = token_statistics(torch.tensor([[1e4, 0.0]]), torch.tensor([1]))
    append("Code lengths are exact at gaps of 10,000 between logits in float32",
           "python benchmarks/perplexity.py exact",
           {f"relative_error_at_a_gap_of_{gap:g}": error for gap, error in worst.items()}
           | {"nats_at_two_logits_10000_apart": float(far.nll), "log_of_softmax_there": naive[1e4]},
           holds=max(worst.values()) < 1e-6 and float(far.nll) == 1e4 and math.isinf(naive[1e4]))  # fmt: skip


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    if command == "stream":
        tell_stream(json.loads(Path(rest[0]).read_text()) if rest and Path(rest[0]).exists() else
                    stream(Path(rest[0]) if rest else None))  # fmt: skip
    elif command == "exact":
        exact()
    elif command == "take":
        from _perplexity_page import take

        take(Path(rest[0]))
    elif command == "page":
        from _perplexity_page import page

        page()
    else:
        sys.exit(__doc__)
