"""Forks this project's commands from a process that has imported torch and transformers already.

A real command spends seconds importing; a fork of this process runs the same `cli.main` with the
same arguments after milliseconds, in a process of its own that can be signalled and killed. Nothing
here starts a thread or opens a channel before a fork.

Run as a program, it serves one Unix socket (its standard input): a message is {"program",
"arguments", "folder", "journal"} with three file descriptors, for output, errors and the exit
status. It answers with the process id, and writes the exit status of a process to its descriptor
when it has ended. A worker with a journal writes down what it sees (tests/journal.py).
"""

import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

EARLY = {signal.SIGINT, signal.SIGTERM}


def main() -> None:
    """Serve until the other side closes the socket; then end what still runs."""
    _import_all()
    server = socket.socket(fileno=os.dup(0))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([server.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 512)
            _reap(children)
        if server.fileno() in ready:
            message, descriptors, _, _ = socket.recv_fds(server, 1 << 16, 3)
            if not message:
                break
            request = json.loads(message)
            output, errors, status = descriptors
            # A signal that comes too early waits until the command is there to take it.
            signal.pthread_sigmask(signal.SIG_BLOCK, EARLY)
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(status)
                _become(request, output, errors)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, EARLY)
            os.close(output)
            os.close(errors)
            children[child] = status
            server.send(json.dumps(child).encode())
    for child in children:
        os.kill(child, signal.SIGKILL)


def _import_all() -> None:
    import torch
    import transformers
    from numba.core.registry import cpu_target
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.bert import modeling_bert
    from transformers.models.roberta import modeling_roberta

    from lorand import adapter
    from lorand.kernels import cpu
    from lorand_coordinator import cli as coordinator
    from lorand_worker import bench, cli, link, merge, session

    loaded = (torch, transformers.AutoTokenizer, transformers.AutoModel, modeling_bert)
    assert all((*loaded, modeling_roberta, adapter, cpu, bench, cli, link, merge, session))
    assert coordinator
    # What numba and transformers import when they are first used.
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()
    get_checkpoint_conversion_mapping("bert")


def _reap(children: dict[int, int]) -> None:
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        code = os.waitstatus_to_exitcode(status)
        os.write(children[child], str(code).encode())
        os.close(children.pop(child))


def _become(request: dict[str, Any], output: int, errors: int) -> None:
    """Be the command, and never return."""
    from lorand_coordinator import cli as coordinator
    from lorand_worker import cli as worker

    code = 1
    try:
        os.chdir(request["folder"])
        if request["journal"]:
            from tests import journal

            journal.record(Path(request["journal"]))
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (errors, 2)):
            os.dup2(descriptor, target)
            os.close(descriptor)
        sys.argv = [request["program"], *request["arguments"]]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EARLY)
        (worker if request["program"] == "lr-worker" else coordinator).main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
