"""The quickstart's commands, one after another, as they stand in docs/quickstart.md."""

import re
import shlex
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests import tiny
from tests.commands import ENVIRONMENT, ROOT, Command, free_port, start

PAGE = ROOT / "docs" / "quickstart.md"


def documented() -> list[list[str]]:
    """Commands of the part for one machine, without comments."""
    part = PAGE.read_text(encoding="utf-8").split("## On one machine")[1].split("## On several")[0]
    blocks = re.findall(r"```sh\n(.*?)```", part, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words and words[0].startswith("lr-")]


class Reader:
    """Gives the commands in a folder, where the model is a tiny one and the port a free one."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self._model = folder, model
        self._address = f"127.0.0.1:{free_port()}"
        self._environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(folder / "state")}

    def give(self, words: list[str]) -> Command:
        words = [self._address if word == "127.0.0.1:7700" else word for word in words]
        program, command, *rest = words
        if command == "serve":
            rest += ["--address", self._address]
        if command in ("prepare", "join", "export") and program == "lr-worker":
            rest += ["--model", str(self._model)]
        log = self.folder / f"{command}-{len(list(self.folder.glob('*.log')))}.log"
        every = (command, *rest)
        return start(self.folder, log, program, *every, environment=self._environment)

    def once(self, words: list[str]) -> str:
        with self.give(words) as command:
            code, output = command.end()
            assert code == 0, f"{shlex.join(words)}: {command.errors()}"
        return output

    def edit(self) -> None:
        """What the page says to edit, and fewer rounds."""
        path = self.folder / "run.toml"
        text = path.read_text(encoding="utf-8")
        for setting, value in (("rounds", 4), ("quorum", 2), ("batch_size", 8)):
            text, count = re.subn(rf"(?m)^{setting} = \d+", f"{setting} = {value}", text, count=1)
            assert count == 1, setting
        path.write_text(text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_the_quickstart_can_be_followed(tmp_path: Path) -> None:
    model, data = tiny.write_model(tmp_path / "model"), tiny.write_data(tmp_path)
    data["hotels"].rename(tmp_path / "first.csv")
    data["gadgets"].rename(tmp_path / "second.csv")
    reader = Reader(tmp_path, model)
    commands = documented()
    names = [" ".join(words[:2]) for words in commands]
    assert names == [
        "lr-coordinator init",
        "lr-worker prepare",
        "lr-coordinator serve",
        "lr-worker join",
        "lr-worker join",
        "lr-coordinator status",
        "lr-coordinator ledger",
        "lr-coordinator ledger",
        "lr-worker export",
    ]
    reader.once(commands[0])
    reader.edit()
    reader.once(commands[1])
    with ExitStack() as stack:
        serve = stack.enter_context(reader.give(commands[2]))
        workers = [stack.enter_context(reader.give(words)) for words in commands[3:5]]
        ended = [worker.end() for worker in workers]
        assert [code for code, _ in ended] == [0, 0], [worker.errors() for worker in workers]
        assert len({output.split("weights ")[1] for _, output in ended}) == 1
        shown = reader.once([word for word in commands[5] if word != "--watch"])
        assert "finished: 4 rounds are committed" in shown
        assert serve.running()
    assert (tmp_path / "adapter" / "adapter.safetensors").exists()
    for words in commands[6:]:
        reader.once(words)
    assert (tmp_path / "trained" / "merged" / "model.safetensors").exists()
