"""Examples of a causal language model as tokens, and which of them are learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorand.errors import DataError, ModelError
from lorand.sections import PLAIN_TEMPLATE, TaskSection
from lorand_worker.data import ASSISTANT, Chats, Pairs, Texts, Turn
from lorand_worker.tasks.prompts import Prompt


@dataclass(frozen=True)
class Answers:
    """Token ids, and the places of those that are learned, a list each example.

    `cut` counts examples of which something did not fit.
    """

    ids: list[list[int]]
    learned: list[list[int]]
    cut: int = 0


def of(tokenizer: Any, examples: Pairs | Texts | Chats, task: TaskSection, room: int) -> Answers:
    """Return the examples within `room` tokens each. Raises DataError or ModelError."""
    if isinstance(examples, Pairs):
        return pairs(tokenizer, examples, task, room)
    if isinstance(examples, Texts):
        return texts(tokenizer, examples, room)
    return chats(tokenizer, examples, room)


def pairs(tokenizer: Any, examples: Pairs, task: TaskSection, room: int) -> Answers:
    """Prompts in the template; the answers and the end of the text are learned.

    A prompt is cut where it is too long, an answer never.
    """
    prompt = Prompt(tokenizer, task.template or PLAIN_TEMPLATE, masked=False)
    answers = [prompt.joint + answer.strip() for answer in examples.answers]
    encoded = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
    for i, row in enumerate(encoded):
        if not row:
            raise DataError(f"the answer of example {i + 1} has no tokens; remove the example")
    rows = [[*row, *_end(tokenizer)] for row in encoded]
    prompts = prompt.fitted(examples.prompts, [room - len(row) for row in rows])
    ids = [[*p, *a] for p, a in zip(prompts, rows, strict=True)]
    learned = [list(range(len(p), len(row))) for p, row in zip(prompts, ids, strict=True)]
    return Answers(ids, learned, prompt.cut)


def texts(tokenizer: Any, examples: Texts, room: int) -> Answers:
    """All of each text but its first token, and its end; what is too long is cut there."""
    end, rows, cut = _end(tokenizer), [], 0
    for row in tokenizer(list(examples.texts), verbose=False)["input_ids"]:
        whole = row if row[-len(end) :] == end else [*row, *end]
        rows.append(whole[:room])
        cut += len(whole) > room
    for i, row in enumerate(rows):
        if len(row) < 2:
            raise DataError(f"example {i + 1} has a single token, so that nothing is predicted")
    return Answers(rows, [list(range(1, len(row))) for row in rows], cut)


def chats(tokenizer: Any, examples: Chats, room: int) -> Answers:
    """What the assistant says, with what ends it; of a long conversation the last turns go."""
    check_chat(tokenizer)
    ids, learned, cut = [], [], 0
    for i, turns in enumerate(examples.turns):
        tokens, places, ends = _conversation(tokenizer, turns, i)
        fitting = [end for end in ends if end <= room]
        if not fitting:
            raise DataError(
                f"the first answer of conversation {i + 1} ends after {ends[0]} tokens, and "
                f"model.max_length is {room}: remove the conversation, or raise model.max_length "
                "in the run file"
            )
        cut += len(fitting) < len(ends)
        ids.append(tokens[: fitting[-1]])
        learned.append([at for at in places if at < fitting[-1]])
    return Answers(ids, learned, cut)


def check_chat(tokenizer: Any) -> None:
    """Raise ModelError unless the tokenizer writes conversations and tells where tokens stand."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer of this model has no chat template: name a model that was tuned to "
            'follow instructions, or set task.format = "pairs" with prompts and answers'
        )
    if not tokenizer.is_fast:
        raise ModelError(
            'task.format = "chat" needs a tokenizer that tells where its tokens stand in a text, '
            "one with a tokenizer.json: name another model"
        )


def _conversation(
    tokenizer: Any, turns: Sequence[Turn], number: int
) -> tuple[list[int], list[int], list[int]]:
    """Token ids, places of the assistant's, and how many tokens there are at its turns' ends."""
    text, spans = _spans(tokenizer, turns, number)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places, ends = list(encoded["input_ids"]), [], []
    for start, end in spans:
        # A space before an answer may be part of its first token, and part of what asks for it.
        inside = [
            at
            for at, (begins, stops) in enumerate(encoded["offset_mapping"])
            if stops > start and begins < end
        ]
        places += [at for at in inside if at]  # the first token of all has nothing before it
        if inside:
            ends.append(inside[-1] + 1)
    if not places:
        raise DataError(
            "the tokenizer has no tokens for what the assistant says in conversation "
            f"{number + 1}; remove it"
        )
    return ids, places, ends


def _spans(tokenizer: Any, turns: Sequence[Turn], number: int) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and where in it the assistant speaks.

    That is what follows the template's own request for an answer. Blanks at its end, which many
    templates write after the mark that ends a turn, are nobody's words.
    """
    whole = _written(tokenizer, turns, number)
    spans = []
    for i, (role, said) in enumerate(turns):
        if role != ASSISTANT or not said.strip():
            continue
        before = _written(tokenizer, turns[:i], number, asks=True)
        after = _written(tokenizer, turns[: i + 1], number)
        if not after.startswith(before) or not whole.startswith(after):
            raise ModelError(
                "the chat template of this model writes earlier turns of a conversation otherwise "
                f"than they were said (turn {i + 1} of conversation {number + 1}), so that what "
                "the assistant says cannot be told apart: give conversations with one answer, or "
                'set task.format = "pairs"'
            )
        spans.append((len(before), len(after.rstrip())))
    return whole, spans


def _written(tokenizer: Any, turns: Sequence[Turn], number: int, *, asks: bool = False) -> str:
    """Turns as the tokenizer's template has them; `asks`: with what comes before an answer."""
    messages = [{"role": role, "content": said} for role, said in turns]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        )
    except Exception as error:  # templates refuse in ways of their own, and may be wrong themselves
        raise DataError(
            f"the chat template of this model does not take conversation {number + 1} "
            f"({' '.join(str(error).split())[:200]}): bring its turns into the order that the "
            "model knows, or remove it"
        ) from error


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
