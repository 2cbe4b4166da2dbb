"""Templates, label words and answers: what fits, what is cut, and what is refused."""

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tests import tiny

from lorand.config import ModelSection, RunConfig, TaskSection
from lorand.errors import ConfigError, DataError, ModelError
from lorand_worker import model, tasks
from lorand_worker.data import Chats, Data, Examples, Pairs, Texts, Turn
from lorand_worker.model import LoadedModel
from lorand_worker.tasks.answers import Answers, chats
from lorand_worker.tasks.answers import texts as texts_of
from lorand_worker.tasks.prompts import Prompt, label_word_ids

WORDS: Final[dict[str, Any]] = {
    "kind": "label-words",
    "labels": tiny.LABELS,
    "label_words": ("awful", "great"),
}


@pytest.fixture(scope="module")
def masked(masked_model: Path) -> LoadedModel:
    return model.load(ModelSection(name="unused"), 2, masked_model, kind="label-words")


@pytest.fixture(scope="module")
def causal(causal_model: Path) -> LoadedModel:
    return model.load(ModelSection(name="unused"), 0, causal_model, kind="causal-lm")


def task_of(loaded: LoadedModel, examples: Data, max_length: int = 40, **task: Any) -> tasks.Task:
    """The task on these examples; nothing is kept, since everything is trained."""
    content = {**tiny.settings("spsa", model={"max_length": max_length}), "task": task}
    names = set(model.trainable_tensors(loaded, "all"))
    return tasks.build(loaded, RunConfig.model_validate(content), examples, trainable=names)


def words(loaded: LoadedModel, template: str, *label_words: str) -> list[int]:
    """The tokens of label words."""
    section = TaskSection.model_validate(
        {**WORDS, "label_words": label_words, "template": template}
    )
    prompt = Prompt(loaded.tokenizer, template, masked="{mask}" in template)
    return label_word_ids(loaded.tokenizer, prompt, section)


# ------------------------------------------------------------- label words


@pytest.mark.parametrize(
    "template", ["{text} it was {mask}", "{mask} , {text}", "a {mask} {text} ."]
)
def test_masked_label_words_are_those_of_their_place(masked: LoadedModel, template: str) -> None:
    expected = masked.tokenizer.convert_tokens_to_ids(["awful", "great"])
    assert words(masked, template, "awful", " great ") == expected


@pytest.mark.parametrize("template", ["{text} it was", "{text} it was "])
def test_causal_label_words_have_their_space(causal: LoadedModel, template: str) -> None:
    """A template that ends with a space means the same: the space is the word's."""
    assert words(causal, template, "awful", "great") == causal.tokenizer.convert_tokens_to_ids(
        ["Ġawful", "Ġgreat"]
    )


def test_after_a_line_break_a_causal_word_has_no_space(causal: LoadedModel) -> None:
    assert words(causal, "{text}\n", "A", "B") == causal.tokenizer.convert_tokens_to_ids(["A", "B"])


@pytest.mark.parametrize(
    ("kind", "template", "label_words", "sentences"),
    [
        (
            "causal",
            "{text} it was",
            ("awful", "splendid"),
            [
                "'splendid' is not one token",
                "'Ġs', 'p'",
                "task.label_words (one token each: great",
            ],
        ),
        ("causal", "{text}\n", ("awful", "great"), ["'awful' is not one token", "task.template"]),
        ("masked", "{mask} {text}", ("bad-ish", "great"), ["'bad-ish'", "'[UNK]', '[UNK]'"]),
        (
            "masked",
            "{mask} {text}",
            ("awful", "splendid"),
            ["does not know the label word", "(one token each: great, A)"],
        ),
        ("masked", "{mask} {text}", ("Great", "great"), ["'Great' and 'great' are the same token"]),
    ],
)
def test_label_words_that_cannot_be_told(
    request: pytest.FixtureRequest,
    kind: str,
    template: str,
    label_words: tuple[str, ...],
    sentences: list[str],
) -> None:
    with pytest.raises(ModelError) as caught:
        words(request.getfixturevalue(kind), template, *label_words)
    for sentence in sentences:
        assert sentence in str(caught.value)


def test_a_template_of_the_other_kind_of_model(masked: LoadedModel, causal: LoadedModel) -> None:
    examples = Examples(("a",), (0,))
    with pytest.raises(ModelError, match=r"has no \{mask\}.* write, for example"):
        task_of(masked, examples, template="{text} it was", **WORDS)
    with pytest.raises(ModelError, match=r"has \{mask\}, but .* is causal .* write, for example"):
        task_of(causal, examples, template="{text} it was {mask}", **WORDS)


# ------------------------------------------------------------- what is cut


def text_of(loaded: LoadedModel, task: tasks.Task, example: int = 0) -> str:
    """An example's tokens as text."""
    return str(loaded.tokenizer.decode(task._ids[example]))


@pytest.mark.parametrize("max_length", [9, 12, 40])
def test_the_template_stays_whole(
    masked: LoadedModel, causal: LoadedModel, max_length: int
) -> None:
    examples = Examples(("lovely " * 60, "clean"), (1, 1))
    of = task_of(masked, examples, max_length, template="{text} it was {mask}", **WORDS)
    assert len(of._ids[0]) == max_length
    assert text_of(masked, of).endswith("lovely it was [MASK] [SEP]")
    assert text_of(masked, of, 1) == "[CLS] clean it was [MASK] [SEP]"
    of = task_of(causal, examples, max_length, template="{text} it was", **WORDS)
    assert max_length - 2 <= len(of._ids[0]) <= max_length, "a word may be cut into more tokens"
    assert text_of(causal, of).endswith(" it was")


def test_a_prompt_is_cut_and_its_answer_is_not(causal: LoadedModel) -> None:
    pairs = Pairs(("lovely " * 60,), ("great clean room",))
    of = task_of(causal, pairs, 12, kind="causal-lm", template="{text} it was")
    assert len(of._ids[0]) <= 12
    assert of.cut == 1
    assert text_of(causal, of).endswith(f" it was great clean room{tiny.END}")
    assert text_of(causal, of).startswith("lovely")


def test_the_plain_template_is_a_line_each(causal: LoadedModel) -> None:
    of = task_of(causal, Pairs(("a room",), (" great ",)), kind="causal-lm")
    assert text_of(causal, of) == f"a room\ngreat{tiny.END}"


def test_placeholders_in_a_text_are_text(causal: LoadedModel) -> None:
    pairs = Pairs(("{text} {mask} {answer}",), ("{text}",))
    of = task_of(causal, pairs, 60, kind="causal-lm", template="{x} {text}:")
    assert text_of(causal, of) == f"{{x}} {{text}} {{mask}} {{answer}}: {{text}}{tiny.END}"


def test_nothing_of_a_prompt_is_predicted(causal: LoadedModel) -> None:
    """Other words after the same ones: the prompt's own tokens do not count."""
    of = task_of(causal, Pairs(("a", "a"), ("great", "great room")), kind="causal-lm")
    targets = of._targets([0, 1])
    assert targets.places is not None
    [g, r] = causal.tokenizer(["great", "great room"])["input_ids"]
    end = causal.tokenizer.eos_token_id
    assert targets.labels.tolist() == [*g, end, *r, end]
    rows, columns = targets.places
    assert rows.tolist() == [0] * (len(g) + 1) + [1] * (len(r) + 1)
    assert torch.equal(columns[: len(g) + 1], torch.arange(len(g) + 1) + 1), "after 'a' and a break"


# ------------------------------------------------------------- texts and conversations

ASKED: Final[tuple[Turn, ...]] = (("system", "the room"), ("user", "was it clean"))
TWICE: Final[tuple[Turn, ...]] = (
    *ASKED,
    ("assistant", "it was great"),
    ("user", "and the bed"),
    ("assistant", "awful"),
)


def said(loaded: LoadedModel, answers: Answers, example: int = 0) -> tuple[str, str]:
    """All of an example, and what of it is learned."""
    ids = answers.ids[example]
    parts = [ids[at] for at in answers.learned[example]]
    return str(loaded.tokenizer.decode(ids)), str(loaded.tokenizer.decode(parts))


def test_only_the_assistants_words_are_learned(causal: LoadedModel) -> None:
    """With the mark that ends them; a turn without words is nobody's."""
    whole, learned = said(causal, chats(causal.tokenizer, Chats((TWICE,)), 60))
    assert whole == (
        f"[system] the room{tiny.END}\n[user] was it clean{tiny.END}\n[assistant] it was great"
        f"{tiny.END}\n[user] and the bed{tiny.END}\n[assistant] awful{tiny.END}"
    )
    assert learned == f" it was great{tiny.END} awful{tiny.END}"
    silent = Chats(((("assistant", " "), *TWICE),))
    assert said(causal, chats(causal.tokenizer, silent, 99))[1] == learned


def test_of_a_long_conversation_the_last_turns_go(causal: LoadedModel) -> None:
    tokenizer = causal.tokenizer
    whole, first = (len(chats(tokenizer, Chats((t,)), 99).ids[0]) for t in (TWICE, TWICE[:3]))
    both = Chats((TWICE, TWICE[:3]))
    assert chats(tokenizer, both, whole).cut == 0
    cut = chats(tokenizer, both, whole - 1)
    assert cut.cut == 1
    assert cut.ids[0] == cut.ids[1]
    assert len(cut.ids[0]) == first
    assert cut.learned[0] == cut.learned[1]
    with pytest.raises(
        DataError, match=rf"answer of conversation 1 ends after {first} tokens, and"
    ):
        chats(tokenizer, both, first - 1)


def test_the_loss_of_a_conversation_is_its_answers(causal: LoadedModel) -> None:
    of = task_of(causal, Chats((TWICE, TWICE[:3])), 60, kind="causal-lm", format="chat")
    answers = chats(causal.tokenizer, Chats((TWICE,)), 60)
    row = torch.tensor([answers.ids[0]])
    with torch.no_grad():
        logits = causal.module(row, torch.ones_like(row))[0]
    places = torch.tensor(answers.learned[0])
    expected = torch.nn.functional.cross_entropy(logits[places - 1], row[0][places])
    with torch.no_grad():
        assert float(of.losses([1, 0])[1]) == pytest.approx(float(expected), abs=1e-5)
    assert of.score().of == "tokens"


def test_whole_texts_are_learned(causal: LoadedModel) -> None:
    texts = Texts(("the room was great", "it " * 90))
    of = task_of(causal, texts, 20, kind="causal-lm", format="text")
    assert text_of(causal, of) == f"the room was great{tiny.END}"
    assert len(of._ids[1]) == 20
    assert of.cut == 1
    targets = of._targets([0])
    assert torch.equal(targets.labels, of._ids[0][1:])
    with pytest.raises(DataError, match="example 1 has a single token"):
        texts_of(causal.tokenizer, Texts(("A",)), 1)


def test_a_tokenizer_without_a_chat_template(causal_model: Path) -> None:
    loaded = model.load(ModelSection(name="unused"), 0, causal_model, kind="causal-lm")
    loaded.tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r'no chat template: .* set task\.format = "pairs"'):
        task_of(loaded, Chats((TWICE,)), kind="causal-lm", format="chat")
    content = {**tiny.settings("spsa"), "task": {"kind": "causal-lm", "format": "chat"}}
    with pytest.raises(ModelError, match="no chat template"):
        tasks.check(loaded, RunConfig.model_validate(content))


@pytest.mark.parametrize(
    ("template", "kind", "sentence"),
    [
        ("{{ raise_exception('roles alternate') }}", DataError, "conversation 1 .roles alternate."),
        (
            "{% for turn in messages %}{% if loop.last %}{{ turn.content }}{% endif %}{% endfor %}",
            ModelError,
            r"turn 3 of conversation 1\), .* give conversations with one answer",
        ),
    ],
)
def test_chat_templates_that_do_not_serve(
    causal_model: Path, template: str, kind: type[Exception], sentence: str
) -> None:
    loaded = model.load(ModelSection(name="unused"), 0, causal_model, kind="causal-lm")
    loaded.tokenizer.chat_template = template
    with pytest.raises(kind, match=sentence):
        chats(loaded.tokenizer, Chats((TWICE,)), 60)


def test_the_chat_template_is_part_of_the_tokenizer_in_runs_of_chats(causal_model: Path) -> None:
    """All workers must write conversations alike; other runs never use it."""
    loaded = model.load(ModelSection(name="unused"), 0, causal_model, kind="causal-lm")
    before = [model.tokenizer_digest(loaded.tokenizer, chats=chats) for chats in (False, True)]
    loaded.tokenizer.chat_template = tiny.CHAT + " "
    after = [model.tokenizer_digest(loaded.tokenizer, chats=chats) for chats in (False, True)]
    assert before[0] == after[0] != before[1]
    assert before[1] != after[1]


# ------------------------------------------------------------- data that cannot be used


def test_an_answer_that_does_not_fit(causal: LoadedModel) -> None:
    pairs = Pairs(("a", "a"), ("great", "great " * 20))
    with pytest.raises(DataError, match=r"example 2 does not fit: .* raise model\.max_length"):
        task_of(causal, pairs, 12, kind="causal-lm")


def test_a_template_that_leaves_no_room(masked: LoadedModel) -> None:
    template = "{text} " + "very " * 10 + "{mask}"
    with pytest.raises(DataError, match=r"example 1 does not fit: .* takes about 1\d;"):
        task_of(masked, Examples(("room",), (0,)), 8, template=template, **WORDS)


def test_a_text_with_the_mask_itself(masked: LoadedModel) -> None:
    examples = Examples(("a room", "a [MASK] room"), (0, 1))
    with pytest.raises(DataError, match="example 2 contains the model's mask token"):
        task_of(masked, examples, template="{text} it was {mask}", **WORDS)


@pytest.mark.parametrize("fixture", ["tiny_model", "roberta_model", "causal_model"])
def test_more_tokens_than_positions(request: pytest.FixtureRequest, fixture: str) -> None:
    """It is said before the run, not by an index in the middle of a round."""
    folder = request.getfixturevalue(fixture)
    causal = fixture == "causal_model"
    kind: Any = "causal-lm" if causal else "classification"
    loaded = model.load(ModelSection(name="unused"), 2, folder, kind=kind)
    task = {"kind": kind} if causal else {"labels": tiny.LABELS}
    long = ("a " * 90,)
    data = Pairs(long, ("great",)) if causal else Examples(long, (0,))
    with pytest.raises(ModelError, match=r"positions for \(72, .* set model\.max_length .* to 68"):
        task_of(loaded, data, 80, **task)
    assert len(task_of(loaded, data, 68, **task)) == 1


# ------------------------------------------------------------- models that do not serve


@pytest.mark.parametrize(
    ("fixture", "kind", "sentence"),
    [
        ("tiny_model", "label-words", "needs a masked or causal language model, but .*BertModel"),
        ("own_model", "causal-lm", "needs a causal language model, .* set task.kind"),
        ("masked_model", "causal-lm", "needs a causal .* saved as BertForMaskedLM"),
    ],
)
def test_a_model_of_another_kind(
    request: pytest.FixtureRequest, fixture: str, kind: Any, sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        model.load(ModelSection(name="unused"), 2, request.getfixturevalue(fixture), kind=kind)


def test_a_checkpoint_without_what_predicts_words(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.write_model(tmp_path, "masked")
    weights = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in weights.items() if "cls." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 'cls\.predictions.*whole language model"):
        model.load(ModelSection(name="unused"), 2, folder, kind="label-words")


def test_a_tied_output_layer_is_one_tensor(causal: LoadedModel, masked: LoadedModel) -> None:
    names = list(model.trainable_tensors(causal, "all"))
    assert "model.transformer.wte.weight" in names
    assert "model.lm_head.weight" not in names
    last = model.trainable_tensors(causal, "last:1")
    assert "model.transformer.ln_f.weight" in last
    assert "model.transformer.wte.weight" not in last
    assert not [n for n in model.trainable_tensors(masked, "all") if "decoder" in n]
    assert causal.new_names == masked.new_names == frozenset()


# ------------------------------------------------------------- run files


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"kind": "classification"}, "task.labels: at least 2 items"),
        ({"kind": "label-words", "label_words": ["a", "b"]}, "task.labels: at least 2 items"),
        ({"kind": "causal-lm", "labels": ["a", "b"]}, "task.labels: .* no labels: remove them"),
        ({**WORDS, "kind": "classification"}, 'for kind = "label-words"; set it, or remove'),
        ({**WORDS, "template": ""}, r"template must have \{text\} exactly once, e\.g\."),
        ({**WORDS, "template": "{text} {text} {mask}"}, "exactly once"),
        ({**WORDS, "template": "{text} {mask} {mask}"}, r"\{mask\} more than once"),
        ({**WORDS, "template": "{text}", "label_words": ["a"]}, "1 words for 2 labels"),
        ({**WORDS, "template": "{text}", "label_words": ["a", " a"]}, "distinct words"),
        ({**WORDS, "template": "{text}", "label_words": ["a", " "]}, "none of them empty"),
        ({"kind": "causal-lm", "template": "no place"}, "exactly once"),
        ({"kind": "causal-lm", "template": "{text} {mask}"}, "does not fill"),
        ({"kind": "causal-lm", "label_words": ["a"]}, "remove them"),
        ({"labels": ["a", "b"], "format": "chat"}, 'format = "chat" is for kind = "causal-lm"'),
        ({"kind": "causal-lm", "format": "chat", "template": "{text}"}, "without a template"),
        ({"kind": "causal-lm", "format": "chats"}, "task.format: Input should be 'pairs', 'text'"),
    ],
)
def test_run_files_that_are_refused(task: dict[str, Any], sentence: str) -> None:
    content = tiny.settings("spsa")
    content["task"] = {k: list(v) if isinstance(v, tuple) else v for k, v in task.items()}
    with pytest.raises(ConfigError, match=sentence):
        RunConfig.parse(tiny.to_toml(content))


def test_a_new_head_is_for_classification() -> None:
    content = tiny.settings("spsa", model={"head": "pooled"})
    content["task"] = {"kind": "causal-lm"}
    with pytest.raises(ConfigError, match=r'model\.head = "pooled" .* set model\.head = "auto"'):
        RunConfig.parse(tiny.to_toml(content))


def test_a_run_of_answers_travels_as_json() -> None:
    content = tiny.settings("spsa")
    content["task"] = {"kind": "causal-lm", "template": "Q: {text}\nA:"}
    config = RunConfig.parse(tiny.to_toml(content))
    assert RunConfig.from_json(config.to_json()) == config
