"""The example scripts run to their end, on models that are made here."""

from pathlib import Path

import pytest
from examples import classification, instructions, label_words
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_classification(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = classification.main(["--model", str(tiny_model), "--rounds", "2"])
    assert made.position.finished
    told = capsys.readouterr().out
    assert "the adapter has" in told
    assert sum(line.split(":")[0] in tiny.LABELS for line in told.splitlines()) == 4


@pytest.mark.slow
def test_label_words(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.write_model(tmp_path_factory.mktemp("words"), "masked", more_words=["terrible"])
    position = label_words.main(["--model", str(model), "--rounds", "2"])
    assert position.committed == 2
    told = capsys.readouterr().out
    assert told.count("finished after 2 rounds") == 3
    assert "BertForMaskedLM after 2 rounds" in told


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_instructions(adapter: str, causal_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if adapter == "lora":
        pytest.importorskip("peft", reason="peft is not installed")
    options = ["--model", str(causal_model), "--rounds", "2", "--adapter", adapter]
    assert instructions.main(options).position.committed == 2
    told = capsys.readouterr().out
    assert "Question: How long do eggs boil?" in told
