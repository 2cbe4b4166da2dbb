"""`make demo`: a zeroth-order and a first-order run with real processes, and a table at the end."""

import asyncio
import json
import os
import shutil
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from experiments.provenance import provenance
from rich.console import Console

from deploy.demo import model, screen
from deploy.demo.relay import Relay
from lorand.v1 import status_pb2 as status
from lorand.v1 import status_pb2_grpc as status_service

HERE: Final = Path(__file__).resolve().parent
DOMAINS: Final = ("hotels", "gadgets", "restaurants")
BIN: Final = Path(sys.executable).parent
RUN_LIMIT_S: Final = 300.0
STOP_LIMIT_S: Final = 30.0
POLL_S: Final = 0.5


@dataclass
class Outcome:
    """What one run showed."""

    accuracy_before: float
    accuracy_after: float
    rounds: int
    seconds: float
    bytes_sent_per_worker: dict[str, int]
    bytes_received_per_worker: dict[str, int]
    digests: dict[str, str] = field(repr=False)
    adapter_bytes: int
    adapter: str

    @property
    def digests_agree(self) -> bool:
        """Whether replay and all replicas hold the same weights, bit for bit."""
        return len(set(self.digests.values())) == 1


class Process:
    """A command whose last line of standard output is JSON; its standard error goes to a file."""

    def __init__(self, name: str, log: Path, *command: str) -> None:
        """Describe it; `start` runs it."""
        self.name, self._log, self._command = name, log, command

    async def start(self) -> "Process":
        """Start the process."""
        with self._log.open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
            )
        return self

    async def line(self) -> dict[str, Any]:
        """Return the next line of output."""
        assert self._process.stdout is not None
        text = await self._process.stdout.readline()
        if not text:
            raise SystemExit(f"{self.name} ended early:\n{self._log.read_text()[-2000:]}")
        return dict(json.loads(text))

    async def result(self) -> dict[str, Any]:
        """Wait for the end and return what it printed."""
        answer = await self.line()
        if await self._process.wait():
            raise SystemExit(f"{self.name} failed:\n{self._log.read_text()[-2000:]}")
        return answer

    def check(self) -> None:
        """Raise SystemExit when it ended with an error."""
        if self._process.returncode:
            raise SystemExit(f"{self.name} failed:\n{self._log.read_text()[-2000:]}")

    async def stop(self) -> None:
        """Ask it to end, and wait."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            self._process.kill()


class Demo:
    """One run of the demo in a folder of its own."""

    def __init__(self, run: str, folder: Path, model_folder: Path, view: screen.Screen) -> None:
        """Copy the run file; held-out data of all domains becomes the evaluator's."""
        self._folder = folder / run
        self._folder.mkdir(parents=True)
        self._model = str(model_folder)
        self._view = view
        shutil.copy(HERE / f"{run}.toml", self._folder / "run.toml")
        test = self._folder / "test.csv"
        parts = [(HERE / "data" / f"{domain}-test.csv").read_text() for domain in DOMAINS]
        test.write_text(parts[0] + "".join(part.split("\n", 1)[1] for part in parts[1:]))

    def _process(self, name: str, *command: str) -> Process:
        program, *rest = command
        return Process(name, self._folder / f"{name}.log", str(BIN / program), *rest, "--json")

    async def _once(self, name: str, *command: str) -> dict[str, Any]:
        return await (await self._process(name, *command).start()).result()

    async def go(self) -> Outcome:
        """Run it all and return what was seen."""
        run = str(self._folder / "run.toml")
        self._view.say("loading the model and writing run.lock")
        await self._once("prepare", "lr-worker", "prepare", run, "--model", self._model)
        async with AsyncExitStack() as stack:
            serve = ("lr-coordinator", "serve", run, "--address", "127.0.0.1:0", "--insecure")
            coordinator = await self._process("coordinator", *serve).start()
            stack.push_async_callback(coordinator.stop)
            address = (await coordinator.line())["address"]
            host, port = address.rsplit(":", 1)
            relays = {domain: Relay((host, int(port))) for domain in DOMAINS}
            for relay in relays.values():
                await relay.start()
                stack.push_async_callback(relay.stop)
            began = time.monotonic()
            workers = [await self._worker(stack, domain, relays[domain]) for domain in DOMAINS]
            evaluator = await self._evaluator(stack, address)
            last = await self._watch(address, relays, [coordinator, evaluator, *workers])
            seconds = time.monotonic() - began
            self._view.say("comparing replicas")
            results = [await worker.result() for worker in workers]
            await evaluator.result()
            return await self._conclude(last, results, relays, seconds)

    async def _worker(self, stack: AsyncExitStack, domain: str, relay: Relay) -> Process:
        data = str(HERE / "data" / f"{domain}-train.csv")
        worker = await self._process(
            domain,
            *("lr-worker", "join", f"127.0.0.1:{relay.port}", "--insecure"),
            *("--data", data, "--seed-pool"),
            # Of its own: each demo begins the same runs anew, which workers with a memory refuse.
            *("--state", str(self._folder / "state")),
            *("--name", domain, "--model", self._model, "--threads", "1", "--device", "cpu"),
        ).start()
        stack.push_async_callback(worker.stop)
        return worker

    async def _evaluator(self, stack: AsyncExitStack, address: str) -> Process:
        data = str(self._folder / "test.csv")
        evaluator = await self._process(
            "evaluator",
            *("lr-worker", "evaluate", address, "--insecure"),
            *("--data", data, "--follow", "--every", "10"),
            *("--name", "held-out", "--model", self._model, "--threads", "1", "--device", "cpu"),
        ).start()
        stack.push_async_callback(evaluator.stop)
        return evaluator

    async def _watch(
        self, address: str, relays: dict[str, Relay], processes: list[Process]
    ) -> status.GetStatusResponse:
        """Show the run until its last evaluation is in the ledger."""
        limit = time.monotonic() + RUN_LIMIT_S
        async with grpc.aio.insecure_channel(address) as channel:
            stub = status_service.StatusServiceStub(channel)
            while time.monotonic() < limit:
                for process in processes:
                    process.check()
                answer: status.GetStatusResponse = await stub.GetStatus(status.GetStatusRequest())
                moved = {name: (relay.sent, relay.received) for name, relay in relays.items()}
                self._view.update(answer, moved)
                done = answer.evaluations and answer.evaluations[-1].committed == answer.rounds
                if answer.phase == "finished" and done:
                    return answer
                await asyncio.sleep(POLL_S)
        raise SystemExit(f"the run did not finish in {RUN_LIMIT_S:.0f} s; see {self._folder}/*.log")

    async def _conclude(
        self,
        last: status.GetStatusResponse,
        results: list[dict[str, Any]],
        relays: dict[str, Relay],
        seconds: float,
    ) -> Outcome:
        """Replay the coordinator's ledger, export the adapter and compare all digests."""
        ledger = str(next(self._folder.glob("*.ledger")))
        exported, adapter = self._folder / "ledger.bin", self._folder / "adapter"
        await self._once("ledger", "lr-coordinator", "ledger", "export", ledger, str(exported))
        replay = ("lr-worker", "replay", str(exported), "--model", self._model)
        replayed, wrote = await asyncio.gather(
            self._once("replay", *replay),
            self._once("export", "lr-worker", "export", str(exported), str(adapter)),
        )
        digests = {result["name"]: result["weights_digest"] for result in results}
        return Outcome(
            accuracy_before=last.evaluations[0].accuracy,
            accuracy_after=last.evaluations[-1].accuracy,
            rounds=last.committed,
            seconds=round(seconds, 1),
            bytes_sent_per_worker={name: relay.sent for name, relay in relays.items()},
            bytes_received_per_worker={name: relay.received for name, relay in relays.items()},
            digests={**digests, "replay": replayed["weights_digest"]},
            adapter_bytes=wrote["adapter_bytes"],
            adapter=str(adapter),
        )


def summary(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Return what demo-summary.json holds."""
    kept = ["accuracy_before", "accuracy_after", "rounds", "seconds"]
    kept += ["bytes_sent_per_worker", "bytes_received_per_worker", "adapter_bytes", "adapter"]
    result: dict[str, Any] = {
        name: {key: getattr(outcome, key) for key in kept} for name, outcome in outcomes.items()
    }
    result["provenance"] = provenance()
    result["digests_agree"] = all(outcome.digests_agree for outcome in outcomes.values())
    result["digests"] = {name: outcome.digests for name, outcome in outcomes.items()}
    result["adapter_bytes"] = max(outcome.adapter_bytes for outcome in outcomes.values())
    return result


async def demo(folder: Path) -> int:
    """Run both runs; return the exit code."""
    console = Console()
    model_folder = model.folder()
    shutil.rmtree(folder, ignore_errors=True)
    outcomes, panels = {}, []
    for run in ("zeroth-order", "first-order"):
        with screen.Screen(console, run) as view:
            outcomes[run.replace("-", "_")] = await Demo(run, folder, model_folder, view).go()
            if view.panel is not None:
                panels.append(view.panel)
    result = summary(outcomes)
    Path("demo-summary.json").write_text(json.dumps(result, indent=1) + "\n")
    screen.table(console, result)
    screen.picture(folder / "demo.svg", panels, result)
    return 0 if result["digests_agree"] else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(demo(Path("demo-run"))))
