"""A life is forked at step 500, one fork is thrown away, the process is killed, and the life goes on."""

import subprocess
import sys
import tempfile
from itertools import islice

import torch

from pliant.learn import Learner, Life, bptt, prequential
from pliant.measure.scores import Bits, Scores
from pliant.models import SequenceClassifier
from pliant.optim import adamw
from pliant.streams import digits, drift


def new_life() -> Life:
    stream = drift.delay(drift.permute(digits(batch=4), every=1000), questions=3)
    torch.manual_seed(0)
    model = SequenceClassifier(8, 10, width=16, depth=1, readout="mean")
    learner = Learner(model, adamw(model, 3e-3), bptt(16))
    return Life(learner=learner, stream=stream, scores=Scores(bits=Bits()))


def run(life: Life, replies: int) -> Life:
    for _ in islice(prequential(life.stream, life.learner, life.scores), replies):
        pass
    return life


def child(folder: str, threads: int) -> None:
    """What the process that is killed does: it saves at step 700, goes on, and never comes to an end."""
    torch.set_num_threads(threads)  # sums are added up in another order with another number
    life = run(new_life(), 700)
    life.save(folder)
    print("saved", flush=True)
    run(life, 10**9)


def main() -> tuple[list[str], list[str]]:
    life = run(new_life(), 500)
    fork, other = life.fork(), life.fork()
    run(fork, 200)
    run(other, 50)  # what happens to one fork does not touch the others
    del other
    between_forks = run(life, 200).diff(fork)

    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, __file__, folder, str(torch.get_num_threads())], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.communicate()
        resumed = new_life()
        resumed.load(folder)
    return between_forks, resumed.diff(life)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(sys.argv[1], int(sys.argv[2]))
    else:
        forks, resumed = main()
        print(f"parts that differ between the forks: {forks}; after the kill: {resumed}")
