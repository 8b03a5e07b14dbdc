"""The README does what it says: every block of it is executed, in order, in an empty folder.

Python blocks run as they stand. A yaml block is saved under the name in its first line. Of the shell
commands, `make` must name a target of the Makefile; `pyvlm` and `python -m benchmarks` run in their quick
form; the small benchmarks run without their timing. Any other command fails the test.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks.__main__
from pyvlm import cli
from pyvlm.training.demo import leave_pictures

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TARGETS = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()

# Appended to a command, so that it takes seconds.
QUICK_FORM = {
    "train": ["--variant", "quick"],
    "eval": ["--dialogues", "8"],
    "ablate": ["--variant", "quick", "--seeds", "1", "--budget", "1e10", "--set", "evaluation.dialogues=2"],
}


def blocks() -> Iterator[tuple[str, str, int]]:
    """Language, content and the number of the first line of each fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        yield match.group(1), match.group(2), README[: match.start(2)].count("\n") + 1


def run_command(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        assert arguments[0] in TARGETS
    elif program == "pyvlm":
        quick = [] if "--tiny" in arguments or "talk.jsonl" in arguments else QUICK_FORM.get(arguments[0], [])
        assert cli.main([*arguments, *quick]) == 0
    elif (program, *arguments[:2]) == ("python", "-m", "benchmarks"):
        assert benchmarks.__main__.main([*arguments[2:], "--quick"]) == 0
    elif program == "pytest":
        timed = [argument for argument in arguments if argument != "--benchmark-enable"]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *timed], cwd=ROOT, check=True)
    else:
        raise AssertionError("no test knows how to check this command")


def test_every_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    leave_pictures(Path("runs/demo/images"))  # as `make demo`, the README's first command, does
    namespace: dict[str, object] = {}
    for language, content, line in blocks():
        if language == "python":
            exec(compile("\n" * (line - 1) + content, "README.md", "exec"), namespace)
        elif language == "yaml":
            Path(content.split()[1]).write_text(content)
        elif language == "sh":
            for command in content.splitlines():
                try:
                    run_command(command)
                except (Exception, SystemExit) as error:
                    raise AssertionError(
                        f"README.md, block at line {line}: {command}\n{capsys.readouterr()}"
                    ) from error
        else:
            raise AssertionError(f"README.md, line {line}: a block in {language}, which no test executes")


def test_every_path_exists() -> None:
    paths = set(re.findall(r"`((?:csrc|pyvlm|tests|benchmarks)/[\w/.]*)`", README))
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_rule_is_listed() -> None:
    from pyvlm.layout import RULES

    table = README[README.index("| rule |") :]
    assert tuple(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))[: len(RULES)] == RULES
