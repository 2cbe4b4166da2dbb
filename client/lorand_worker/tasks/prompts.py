"""Templates: texts put into them, tokenised, and cut so that the template stays whole."""

from collections.abc import Callable, Sequence
from typing import Any, Final

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


COMMON: Final = (
    *("great", "good", "terrible", "bad", "positive", "negative", "yes", "no", "true", "false"),
    *("right", "wrong", "fine", "poor", "happy", "sad", "more", "less", "maybe", "neutral"),
    *("world", "sports", "business", "science", "A", "B", "C", "D", "1", "2", "3", "4"),
)
"""Words that are one token in many vocabularies, to be suggested."""
SUGGESTED: Final = 8


def label_word_ids(tokenizer: Any, prompt: Prompt, task: TaskSection) -> list[int]:
    """Return the token of each label's word at its place in the template.

    Raises ModelError for a word that is several tokens there, unknown, or another label's token.
    """
    at_place = _AtPlace(tokenizer, prompt, task)
    found: dict[int, str] = {}
    for word in map(str.strip, task.label_words):
        here, all_of_it = at_place.tokens(word)
        shown = here if here is not None else all_of_it
        tokens = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(shown)))
        if here is None or len(here) != 1:
            raise ModelError(
                f"the label word {word!r} is not one token at its place in task.template, but "
                f"{tokens}; choose a shorter or more common word in task.label_words"
                f"{_instead(at_place, word, task)}, or change what stands around it in "
                "task.template"
            )
        if here[0] == tokenizer.unk_token_id:
            raise ModelError(
                f"the tokenizer of this model does not know the label word {word!r} ({tokens}); "
                f"choose another in task.label_words{_instead(at_place, word, task)}"
            )
        if here[0] in found:
            raise ModelError(
                f"the label words {found[here[0]]!r} and {word!r} are the same token ({tokens}); "
                "choose distinct ones in task.label_words"
            )
        found[here[0]] = word
    return list(found)


class _AtPlace:
    """What words become at the place of a template where they are predicted."""

    def __init__(self, tokenizer: Any, prompt: Prompt, task: TaskSection) -> None:
        self._prompt, self._unknown = prompt, tokenizer.unk_token_id
        [self._plain] = prompt.encode([prompt.rendered(_PROBE)])
        masks = [at for at, token in enumerate(self._plain) if token == tokenizer.mask_token_id]
        masked = masks and prompt.joint == "" and MASK in task.template
        self._start = masks[0] if masked else len(self._plain)

    def tokens(self, word: str) -> tuple[list[int] | None, list[int]]:
        """Return the tokens at the place (None: what is around changed too), and all of them."""
        [whole] = self._prompt.encode([self._prompt.rendered(_PROBE, word)])
        tail = self._plain[self._start + 1 :]
        end = len(whole) - len(tail)
        same = whole[: self._start] == self._plain[: self._start] and whole[end:] == tail
        return (whole[self._start : end] if same else None), whole

    def single(self, word: str) -> int | None:
        """Return the one token that a word is there; None: it is several, or unknown."""
        here, _ = self.tokens(word)
        known = here is not None and len(here) == 1 and here[0] != self._unknown
        return here[0] if known and here else None


def _instead(at_place: _AtPlace, word: str, task: TaskSection) -> str:
    """Words that would do, as a part of a sentence: ways to write this one, and common ones."""
    found: dict[int, str] = {}
    for other in (word.lower(), word.capitalize(), word.upper(), *COMMON):
        token = at_place.single(other)
        if token is not None and other not in task.label_words:
            found.setdefault(token, other)
    listed = ", ".join(list(found.values())[:SUGGESTED])
    return f" (one token each: {listed})" if listed else ""
