"""
A fresh interpreter that has done its imports. Each command line runs in a fork of it, as if typed anew, so
that many of them don't take five seconds of imports each.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

IMPORTED = (
    "protoleak.cli",
    "protoleak.train",
    "protoleak.forensics.scan",
    "protoleak.evaluation.protocol",
    "protoleak.pipeline_protoleak",
    "transformers.pipelines",
    "diffusers.pipelines",
)


class Interpreter:
    """
    Runs commands such as `protoleak attribute ...`, `python train.py ...` and `python -c ...`.

    Args:
        folder (`Path`): Where it may write what commands print.
        path (`Path`): Where it looks for modules first.
        missing (`Collection[str]`): Modules that it finds not installed.
    """

    def __init__(self, folder: Path, path: Path, missing: Collection[str] = ()):
        self.outputs = [str(folder / "stdout"), str(folder / "stderr")]
        command = [sys.executable, __file__, *missing]
        environment = os.environ | {"PYTHONPATH": str(path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def run(self, command: Sequence[str], cwd: Path) -> str:
        """
        What a command, of these words, prints in this folder.

        Raises:
            AssertionError: if it doesn't end with status 0, with its errors.
        """
        request = {"command": [*command], "cwd": str(cwd), "outputs": self.outputs}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        status = self.process.stdout.readline().strip()
        printed, errors = (Path(path).read_text(encoding="utf-8") for path in self.outputs)
        assert status == "0", f"{command} ended with {status}: {errors}"
        return printed

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)


def serve(missing: Sequence[str]) -> None:
    """A command a line, as JSON; answers its exit status."""
    sys.modules.update(dict.fromkeys(missing))
    for name in IMPORTED:
        __import__(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(**json.loads(line))
            return
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


def become(command: list[str], cwd: str, outputs: list[str]) -> None:
    """Be what the command starts; ends as it ends."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(cwd)
    program, *words = command
    if program == "protoleak":
        sys.argv = command
        sys.exit(sys.modules["protoleak.cli"].main())
    assert program == "python", program
    if words[0] == "-c":
        sys.argv, sys.path[0] = words[:1], ""
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1:])
