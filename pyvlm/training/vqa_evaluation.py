"""`pyvlm eval MODEL DATA`: how many of a file's questions a model answers right, by kind."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pyvlm.data.bad_records import BadRecord
from pyvlm.models.speaker import Messages, Speaker
from pyvlm.training.vqa import Question, Skipped
from pyvlm.training.vqa_metrics import (
    FEWEST_HUMANS,
    bootstrap_interval,
    is_exact_match,
    vqa_accuracy,
    wilson_interval,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    """A question, what the model said to it, and how right that is: see `pyvlm.training.vqa_metrics`."""

    question: Question
    given: str

    @property
    def exact(self) -> bool:
        return is_exact_match(self.given, self.question.answers)

    @property
    def accuracy(self) -> float:
        return vqa_accuracy(self.given, self.question.answers)


def answer_questions(
    speaker: Speaker,
    questions: Sequence[Question],
    skipped: Skipped,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    instruction: str = "",
    progress: bool = True,
) -> Iterator[Prediction]:
    """Greedy answers, in the order of the questions.

    Args:
        speaker: what answers; see `pyvlm.training.chat.load_speaker`.
        questions: of `read_questions`.
        skipped: gets the questions that cannot be encoded, such as those with a damaged image.
        batch_size: how many are answered together.
        max_new_tokens: of an answer.
        instruction: a line that is put behind every question, as "Answer the question using a single word or
            phrase." in LLaVA 1.5 (arXiv 2310.03744).
        progress: draw the progress bar.
    """
    with tqdm(total=len(questions), unit="question", disable=not progress, dynamic_ncols=True) as bar:
        for start in range(0, len(questions), batch_size):
            asked = questions[start : start + batch_size]
            encoded = [
                (question, sample)
                for question in asked
                if (sample := _encode(question, speaker, instruction, skipped)) is not None
            ]
            if encoded:
                samples = [sample for _, sample in encoded]
                answers = speaker.reply(samples, max_new_tokens)
                for (question, _), text in zip(encoded, answers, strict=True):
                    yield Prediction(question, text.strip())
            bar.update(len(asked))


def _encode(question: Question, speaker: Speaker, instruction: str, skipped: Skipped) -> Any | None:
    *before, last = question.messages
    if instruction:
        content = last["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        last = {**last, "content": [*parts, {"type": "text", "text": f"\n{instruction}"}]}
    try:
        return speaker.encode(_with_pictures([*before, last], speaker))
    except ValueError as error:
        skipped.add(question.where, BadRecord("cannot be encoded", str(error)))
        return None


def _with_pictures(messages: Messages, speaker: Speaker) -> Messages:
    """The messages with the pictures at their paths, as the model takes them."""

    def read(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image" or not isinstance(part["image"], str):
            return part
        return {**part, "image": speaker.read_picture(part["image"])[0]}

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [read(part) for part in message["content"]]}
        for message in messages
    ]


def summarize(predictions: Sequence[Prediction]) -> list[Row]:
    """One row a kind of question, in alphabetical order, and one for all: counts, means, 95 % intervals.

    `vqa_accuracy` is None where no question has answers of `FEWEST_HUMANS` people or more.

    Raises:
        ValueError: no predictions.
    """
    if not predictions:
        raise ValueError("no question could be put to the model")
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.question.kind].append(prediction)
    rows = [_row(kind or "(none)", groups[kind]) for kind in sorted(groups)] if set(groups) != {""} else []
    return [*rows, _row("all", predictions)]


def _row(kind: str, predictions: Sequence[Prediction]) -> Row:
    total, right = len(predictions), sum(prediction.exact for prediction in predictions)
    by_people = any(len(prediction.question.answers) >= FEWEST_HUMANS for prediction in predictions)
    scores = [prediction.accuracy for prediction in predictions] if by_people else None
    return {
        "type": kind,
        "questions": total,
        "exact_match": right / total,
        "exact_match_interval": wilson_interval(right, total),
        "vqa_accuracy": None if scores is None else sum(scores) / total,
        "vqa_accuracy_interval": None if scores is None else bootstrap_interval(scores),
    }


def format_rows(rows: Sequence[Row]) -> str:
    """The rows of `summarize` for a terminal."""
    width = max(10, *(len(row["type"]) + 2 for row in rows))
    people = any(row["vqa_accuracy"] is not None for row in rows)
    head = f"{'type':<{width}}{'asked':>7}{'exact':>9}{'95 %':>16}"
    lines = [head + (f"{'VQA':>9}{'95 %':>16}" if people else "")]
    for row in rows:
        line = f"{row['type']:<{width}}{row['questions']:>7}" + _figures(row, "exact_match")
        lines.append((line + (_figures(row, "vqa_accuracy") if people else "")).rstrip())
    return "\n".join(lines)


def _figures(row: Row, name: str) -> str:
    if row[name] is None:
        return f"{'-':>9}{'':>16}"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:>9.1%}{f'{low:.1%} to {high:.1%}':>16}"


def keep_predictions(predictions: Iterable[Prediction], path: Path | None) -> list[Prediction]:
    """All predictions; where a path is given, each is a line of JSON there as soon as it is made."""
    if path is None:
        return list(predictions)
    kept = []
    with path.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            kept.append(prediction)
            file.write(json.dumps(_as_json(prediction), ensure_ascii=False) + "\n")
            file.flush()
    return kept


def _as_json(prediction: Prediction) -> dict[str, Any]:
    question = prediction.question
    return {
        "where": question.where,
        "type": question.kind,
        "question": _last_text(question.messages),
        "answers": question.answers,
        "prediction": prediction.given,
        "exact_match": prediction.exact,
        "vqa_accuracy": prediction.accuracy,
    }


def _last_text(messages: Messages) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "<image>") for part in content)
