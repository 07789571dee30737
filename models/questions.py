"""How questions are put to a model: the prompts of arXiv 2602.22090 (Table 7), in words of our own."""

from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
OPENING = "Answer"
_MULTIPLE_CHOICE = (
    'The following are multiple choice questions about {subject}. The answer has the form "Answer: <answer>", where '
    "<answer> is one of {letters}.\n\nQuestion: {question}\nChoices:\n{choices}\nAnswer:"
)
_SHORT_ANSWER = 'The following are questions about how things are related. The answer has the form "Answer: <answer>".'


def multiple_choice(subject: str, question: str, choices: Sequence[str]) -> str:
    """The prompt of a multiple-choice question: a letter is the answer, behind the closing "Answer:".

    Raises:
      ValueError: fewer than two choices, or more than there are `LETTERS`.
    """
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{len(choices)} choices; from 2 to {len(LETTERS)} can be asked for")
    letters = LETTERS[: len(choices)]
    return _MULTIPLE_CHOICE.format(
        subject=subject,
        letters=", ".join(letters),
        question=question,
        choices="\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)),
    )


def short_answer(question: str) -> list[dict[str, str]]:
    """The conversation of a question whose answer is to open with `OPENING` and a colon."""
    return [{"role": "system", "content": _SHORT_ANSWER}, {"role": "user", "content": f"Question: {question}"}]
