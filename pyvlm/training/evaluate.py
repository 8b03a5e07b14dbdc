"""Held-out accuracy by kind of question, beside what the commonest answers would score."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyvlm.models.inputs import to_device
from pyvlm.models.processor import Processor
from pyvlm.models.speaker import Messages
from pyvlm.models.vlm import VLM
from pyvlm.nn.moe import MODALITIES
from pyvlm.training.bundled import Bundled, bundled_dialogues
from pyvlm.training.conversation import answer, ask, dialogue_messages, open_conversation
from pyvlm.training.dialogue import Dialogue
from pyvlm.training.replies import reply


@dataclass(frozen=True)
class Asked:
    """A question that was put to the model, the word that would be right, and all that the model said."""

    kind: str
    question: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """Whether the last word is the expected one; what comes before it is working."""
        return self.given.split()[-1:] == [self.expected]


@dataclass(frozen=True)
class Transcript:
    """A dialogue as it went, the model's own answers in it."""

    dialogue: Dialogue
    rounds: list[Asked]


@dataclass(frozen=True)
class Evaluation:
    """Transcripts, and the share of right answers among all of them."""

    transcripts: list[Transcript]

    @property
    def asked(self) -> list[Asked]:
        return [asked for transcript in self.transcripts for asked in transcript.rounds]

    @property
    def accuracy(self) -> float:
        return share_right(self.asked)

    def by_kind(self) -> dict[str, list[Asked]]:
        """The questions of each kind, in alphabetical order of the kinds."""
        groups: dict[str, list[Asked]] = defaultdict(list)
        for asked in self.asked:
            groups[asked.kind].append(asked)
        return dict(sorted(groups.items()))


def share_right(asked: Sequence[Asked]) -> float:
    """The share of right answers; NaN without questions."""
    return sum(a.right for a in asked) / len(asked) if asked else float("nan")


def evaluate(
    model: VLM, processor: Processor, dialogues: Sequence[Dialogue], batch_size: int = 64
) -> Evaluation:
    """Holds the dialogues round by round.

    The model generates every answer greedily, and further rounds see its own answers, right or wrong, never
    the true ones. An answer is right if its last word is the expected one.
    """
    transcripts: list[Transcript] = []
    for start in range(0, len(dialogues), batch_size):
        transcripts += _hold(model, processor, dialogues[start : start + batch_size])
    return Evaluation(transcripts)


def _hold(model: VLM, processor: Processor, dialogues: Sequence[Dialogue]) -> list[Transcript]:
    transcripts = [Transcript(dialogue, []) for dialogue in dialogues]
    conversations: list[Messages] = [[] for _ in dialogues]
    for number in range(max(len(dialogue.rounds) for dialogue in dialogues)):
        active = [i for i, dialogue in enumerate(dialogues) if number < len(dialogue.rounds)]
        for i in active:
            question = dialogues[i].rounds[number].question
            conversations[i] = (
                ask(conversations[i], question)
                if number
                else open_conversation(list(dialogues[i].images), question)
            )
        answers = reply(model, processor, [conversations[i] for i in active])
        for i, text in zip(active, answers, strict=True):
            conversations[i] = answer(conversations[i], text)
            asked = dialogues[i].rounds[number]
            transcripts[i].rounds.append(Asked(asked.kind, asked.question, asked.answer, text))
    return transcripts


def commonest_answers(config: Bundled, seed: int, dialogues: int = 1000) -> dict[str, str]:
    """For each kind of question the answer that training dialogues give most often."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for dialogue in bundled_dialogues("train", config, seed).batch(0, range(dialogues)):
        for asked in dialogue.rounds:
            seen[asked.kind][asked.answer] += 1
    return {kind: answers.most_common(1)[0][0] for kind, answers in seen.items()}


def accuracy_table(result: Evaluation, baseline: dict[str, str]) -> list[dict[str, float | int | str]]:
    """One row a kind of question and one for all, with the accuracy of the commonest answers as baseline."""
    groups = {**result.by_kind(), "all": result.asked}
    return [
        {
            "kind": kind,
            "questions": len(asked),
            "accuracy": share_right(asked),
            "baseline": sum(a.expected == baseline.get(a.kind) for a in asked) / len(asked),
        }
        for kind, asked in groups.items()
    ]


@torch.no_grad()
def expert_load(
    model: VLM, processor: Processor, dialogues: Sequence[Dialogue]
) -> list[dict[str, list[float]]]:
    """For each MoE layer, the share of each modality's dispatched tokens that each expert worked on."""
    batch = processor.collate([processor.encode(dialogue_messages(d)) for d in dialogues])
    model.eval()
    output = model(**to_device(batch, next(model.parameters()).device))
    loads = []
    for stats in output.moe_stats:
        counts_ME = stats.dispatched.double()
        shares_ME = counts_ME / counts_ME.sum(1, keepdim=True).clamp(min=1)
        loads.append(dict(zip(MODALITIES, shares_ME.tolist(), strict=True)))
    return loads
