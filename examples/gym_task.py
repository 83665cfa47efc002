"""A Gymnasium task in the same loop: the stream acts on the output, the return is a late answer.

The policy gradient is a loss over (output, answer); nothing else of the learner changes. Only
episodes that were longer than usual are learned from, so that no update pushes probabilities to zero.
"""

import gymnasium
import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.core import Answer, Batch, Question, UsageError, generator
from pliant.learn import Learner, bptt
from pliant.models import SequenceClassifier
from pliant.optim import adamw
from pliant.streams import Spec, Stream


class CartPole(Stream):
    """One question per step; when an episode ends, every step of it is answered with (action, advantage)."""

    def __init__(self, episodes: int, seed: int = 0):
        self.spec, self.episodes, self.time = Spec(4, 2, 1, 1), episodes, 0
        self.env, self.draws = gymnasium.make("CartPole-v1"), generator(seed, "actions")
        self.observation, self.fresh = self.env.reset(seed=seed)[0], True
        self.taken: list[tuple[int, int]] = []
        self.returns: list[float] = []

    def send(self, output: Tensor | None) -> Batch | None:
        answers: tuple[Answer, ...] = ()
        if output is not None:
            action = int(torch.multinomial(output[0, -1].softmax(-1), 1, generator=self.draws))
            self.observation, _, ended, cut, _ = self.env.step(action)
            self.taken.append((self.time, action))
            self.time, self.fresh = self.time + 1, False
            if ended or cut:
                answers = self._answers()
                self.observation, self.fresh = self.env.reset()[0], True
        if len(self.returns) == self.episodes:
            return Batch(answers, None) if answers else None
        yes = torch.ones(1, 1, dtype=torch.bool)
        inputs = torch.as_tensor(self.observation, dtype=torch.float32).reshape(1, 1, 4)
        return Batch(answers, Question(inputs, yes & self.fresh, yes, self.time, torch.zeros(1, dtype=torch.int64)))

    def _answers(self) -> tuple[Answer, ...]:
        length, yes = len(self.taken), torch.ones(1, 1, dtype=torch.bool)
        self.returns.append(float(length))
        typical = sum(self.returns[-20:]) / len(self.returns[-20:])
        taken, self.taken = self.taken, []
        targets = [torch.tensor([[[action, max(0.0, length / typical - 1)]]]) for _, action in taken]
        rows = torch.zeros(1, dtype=torch.int64)
        return tuple(Answer(to, yes, yes, time, rows) for to, (time, _) in zip(targets, taken, strict=True))

    def state_dict(self) -> dict[str, object]:
        raise UsageError("CartPole cannot save the state of its simulator, so a life with it cannot be saved")

    load_state_dict = state_dict


def policy_gradient(output: Tensor, answer: Answer) -> Tensor:
    action, advantage = answer.targets[..., 0].long(), answer.targets[..., 1]
    return (F.cross_entropy(output.flatten(0, 1), action.flatten(), reduction="none") * advantage.flatten()).mean()


def main(episodes: int = 40) -> list[float]:
    torch.manual_seed(0)
    stream, model = CartPole(episodes), SequenceClassifier(4, 2, width=16, depth=1)
    learner = Learner(model, adamw(model, 1e-3), bptt(1), loss=policy_gradient, remember=501)
    output = None
    while batch := stream.send(output):
        for answer in batch.answers:
            learner.learn(answer)
        output = None if batch.question is None else learner.predict(batch.question)
    return stream.returns


if __name__ == "__main__":
    returns = main()
    first, last = sum(returns[:10]) / 10, sum(returns[-10:]) / 10
    print(f"mean return of the first ten episodes {first:.1f}, of the last ten {last:.1f}")
