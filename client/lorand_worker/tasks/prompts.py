"""Templates: texts put into them, tokenised, and cut so that the template stays whole."""

from collections.abc import Callable, Sequence
from typing import Any

from lorand.errors import DataError, ModelError
from lorand.sections import MASK, TEXT, TaskSection

Encode = Callable[[list[str]], list[list[int]]]
"""Token ids of rendered texts."""
_PROBE = "a"
"""Stands for a text where only the template matters."""


class Prompt:
    """A template for one tokenizer: what precedes the answer, or surrounds a masked one.

    What follows a causal prompt is a word of its own: a space belongs to it, unless the template
    ends with a line break.
    """

    def __init__(self, tokenizer: Any, template: str, *, masked: bool) -> None:
        """Raise ModelError when the template does not suit a masked, or a causal, model."""
        if masked and MASK not in template:
            raise ModelError(
                f"task.template = {template!r} has no {MASK}, but the run's model is masked and "
                f'answers there; write, for example, "{TEXT} It was {MASK}."'
            )
        if not masked and MASK in template:
            raise ModelError(
                f"task.template = {template!r} has {MASK}, but the run's model is causal and goes "
                f'on at the end of the template; write, for example, "{TEXT}\\nSentiment:"'
            )
        self.cut = 0
        self._tokenizer = tokenizer
        self._masked = masked
        self._template = template if masked else template.rstrip(" ")
        self.joint = "" if masked or self._template.endswith("\n") else " "

    def rendered(self, text: str, answer: str | None = None) -> str:
        """Return the template around a text, with an answer at its place."""
        if not self._masked:
            # The text last: what it contains is never taken for a placeholder.
            return self._template.replace(TEXT, text) + self.joint * bool(answer) + (answer or "")
        mask = self._tokenizer.mask_token if answer is None else answer
        return self._template.replace(MASK, mask).replace(TEXT, text)

    def encode(self, rendered: list[str]) -> list[list[int]]:
        """Return token ids; a causal prompt stays open, without what ends a text."""
        encoded = self._tokenizer(rendered, return_special_tokens_mask=True, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        if self._masked:
            return ids
        marks = encoded["special_tokens_mask"]
        return [row[: _last_own(mark)] for row, mark in zip(ids, marks, strict=True)]

    def fitted(self, texts: Sequence[str], rooms: Sequence[int]) -> list[list[int]]:
        """Return the ids of texts in the template, each within so many tokens.

        A text that is too long is cut at its end, the template stays, and `cut` counts it. Raises
        DataError where not even one character of it would be left.
        """
        result = self.encode([self.rendered(text) for text in texts])
        for i, (text, room) in enumerate(zip(texts, rooms, strict=True)):
            if len(result[i]) > room:
                result[i] = self._cut(i, text, room)
                self.cut += 1
        return result

    def _cut(self, example: int, text: str, room: int) -> list[int]:
        fits, too_long = 0, len(text)
        ids: list[int] = []
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            [found] = self.encode([self.rendered(text[:middle])])
            if len(found) <= room:
                fits, ids = middle, found
            else:
                too_long = middle
        if not ids:
            [empty] = self.encode([self.rendered(_PROBE)])
            raise DataError(
                f"example {example + 1} does not fit: of model.max_length {max(room, 0)} tokens "
                f"are left for its prompt, and the template alone takes about {len(empty) - 1}; "
                "remove the example, shorten its answer or task.template, or raise "
                "model.max_length in the run file"
            )
        return ids


def _last_own(marks: Sequence[int]) -> int:
    """Where the special tokens at the end of a row begin."""
    end = len(marks)
    while end and marks[end - 1]:
        end -= 1
    return end


def label_word_ids(tokenizer: Any, prompt: Prompt, task: TaskSection) -> list[int]:
    """Return the token of each label's word at its place in the template.

    Raises ModelError for a word that is several tokens there, unknown, or another label's token.
    """
    [plain] = prompt.encode([prompt.rendered(_PROBE)])
    masks = [at for at, token in enumerate(plain) if token == tokenizer.mask_token_id]
    start = masks[0] if masks and prompt.joint == "" and MASK in task.template else len(plain)
    tail = plain[start + 1 :]
    found: dict[int, str] = {}
    for word in map(str.strip, task.label_words):
        [whole] = prompt.encode([prompt.rendered(_PROBE, word)])
        here = whole[start : len(whole) - len(tail)]
        same = whole[:start] == plain[:start] and whole[len(whole) - len(tail) :] == tail
        tokens = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(here if same else whole)))
        if not same or len(here) != 1:
            raise ModelError(
                f"the label word {word!r} is not one token at its place in task.template, but "
                f"{tokens}; choose a shorter or more common word in task.label_words, or change "
                "what stands around it in task.template"
            )
        if here[0] == tokenizer.unk_token_id:
            raise ModelError(
                f"the tokenizer of this model does not know the label word {word!r} ({tokens}); "
                "choose another in task.label_words"
            )
        if here[0] in found:
            raise ModelError(
                f"the label words {found[here[0]]!r} and {word!r} are the same token ({tokens}); "
                "choose distinct ones in task.label_words"
            )
        found[here[0]] = word
    return list(found)
