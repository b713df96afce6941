"""Python with the large libraries imported already: a server that forks a process for each program it is asked to run.

    python warm.py serve SOCKET     imports them, and serves until its stdin is closed
    python warm.py [-u] -m MODULE ... | SCRIPT ...     runs a program in a process of the server at $WARM_SERVER

Importing torch and transformers takes a process of its own ten seconds. What the program sees is what it would see in
its own process: folder, environment, streams, cores and signals, and none of the project's modules. The second form
stands for it: it forwards signals, ends as it ends, and takes it along when killed. Other arguments are left to Python.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

# The server's socket, and a script that runs the second form. torchrun starts what it launches by the latter.
ADDRESS, PYTHON = "WARM_SERVER", "PYTHON_EXEC"
# What stages import most of. None of it is the project's, which may be another copy than this one.
LIBRARIES = (
    *("torch", "torchvision", "torch.onnx", "torch._inductor.compile_fx", "transformers.trainer", "onnxscript"),
    *("transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.models.qwen2_vl.processing_qwen2_vl"),
    *("accelerate.commands.launch", "peft", "bitsandbytes", "datasets", "pyarrow.parquet", "pandas"),
    *("matplotlib.pyplot", "nltk", "sacrebleu", "rouge_score"),
)  # onnxruntime, quick to import, begins a thread, which a forked process would lack
FORWARDED = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


def runs_there(words: list[str]) -> bool:
    """Return whether the server can run it: a module or a script."""
    program = words[words[:1] == ["-u"] :]
    return bool(program) and (program[0] == "-m" or program[0].endswith(".py"))


def ask(words: list[str]) -> int:
    """Have the server run the program, and return its status, or the negative number of the signal that ended it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        cores = sorted(os.sched_getaffinity(0))
        request = {"words": words, "folder": str(Path.cwd()), "environment": dict(os.environ), "cores": cores}
        socket.send_fds(server, [b"."], [0, 1, 2])
        with server.makefile("rw") as lines:
            lines.write(json.dumps(request) + "\n")
            lines.flush()
            process = int(lines.readline())
            for number in FORWARDED:
                signal.signal(number, lambda number, _: os.kill(process, number))
            return int(lines.readline())


def serve(address: str) -> list[str]:
    """Serve until stdin is closed. Return in each process forked for a program: the program's words."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # so that processes go on sharing what has been imported
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    server.close()
                    return keep(connection)
    sys.exit()


def keep(connection: socket.socket) -> list[str]:
    """Fork the program's process, and end with it; returns there."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rw") as lines:
        request = json.loads(lines.readline())
        process = os.fork()
        if process:
            lines.write(f"{process}\n")
            lines.flush()
            threading.Thread(target=kill_without, args=(connection, process), daemon=True).start()
            _, ended = os.waitpid(process, 0)
            with suppress(BrokenPipeError):
                lines.write(f"{os.waitstatus_to_exitcode(ended)}\n")
                lines.flush()
            os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.sched_setaffinity(0, request["cores"])
    sys.executable = os.environ[PYTHON]
    return request["words"]


def kill_without(connection: socket.socket, process: int) -> None:
    """Kill the process when what stands for it has gone."""
    connection.recv(1)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def run(words: list[str]) -> int:
    """Run the program as this process's own, and return its status."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    sys.stdout.reconfigure(write_through=words[0] == "-u")
    program, *arguments = words[1:] if words[0] == "-u" else words
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    try:
        if program == "-m":
            sys.argv, sys.path[:1] = arguments, [str(Path.cwd()), *paths]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:1] = [program, *arguments], [str(Path(program).resolve().parent), *paths]
            runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(status: int) -> None:
    """End this process as Python ends, but for taking down a million objects that are the server's."""
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        end(run(serve(sys.argv[2])))
    elif runs_there(sys.argv[1:]):
        status = ask(sys.argv[1:])
        if status < 0:
            with suppress(OSError):  # SIGKILL has no other
                signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        sys.exit(status)
    else:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
