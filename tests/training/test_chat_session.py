import contextlib
import os
import pty
import re
import select
import signal
import sys
import time

import pytest
import torch

from pyvlm.models.speaker import Sampling
from pyvlm.models.vlm import VLM
from pyvlm.training.chat import Chat
from pyvlm.training.chat_session import ChatSession, complete_with_tab, harmless
from pyvlm.training.digits import load_split
from pyvlm.training.pictures import write_pictures
from pyvlm.training.replies import VLMSpeaker

QUESTION = "which digit is in image 1?"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_pictures(
        list(load_split("test")[0][:2]), ["one.png", "two words.png"], tmp_path_factory.mktemp("images")
    )


@pytest.fixture
def session(small_recipe):
    """A session that is given lines (an exception among them is raised) and keeps all that it puts out."""

    def make(*lines, interactive=True):
        torch.manual_seed(0)
        recipe = small_recipe(model={"initializer_range": 0.5})
        queue, prompts, written, told = list(lines), [], [], []

        def read(prompt):
            prompts.append(prompt)
            line = queue.pop(0) if queue else EOFError()
            if isinstance(line, BaseException):
                raise line
            return line

        chat = Chat(VLMSpeaker(VLM(recipe.model), recipe.processor(), Sampling(6)), [], told.append)
        made = ChatSession(chat, read, written.append, told.append, interactive)
        made.prompts, made.written, made.told = prompts, written, told
        return made

    return make


def test_a_conversation_with_commands(session, paths, tmp_path):
    held = session(
        f"/image {paths[0]}",
        f'/image "{paths[1]}"',
        QUESTION,
        "  ",
        "",
        f"/save {tmp_path / 'a.json'}",
        QUESTION,
    )
    held.run()
    assert held.prompts == ["> ", "[1 picture] > ", "[2 pictures] > ", *["> "] * 5]
    assert held.told == [f"saved {tmp_path / 'a.json'}"]
    answers = [message["content"] for message in held.chat.messages if message["role"] == "assistant"]
    assert "".join(held.written) == "".join(f"{text}\n" for text in answers)
    assert len(answers) == 2
    assert (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/imagine a cat", "/imagine is unknown; expected one of /image, /system"),
        ("/image", "/image needs a path behind it"),
        ("/image ''", "/image needs a path behind it"),
        ("/image no/such.png", "no/such.png': there is no such file"),
        ("/image {folder}/torn.png", "torn.png': not an image"),
        ("/save", "/save needs a path behind it"),
        ("/save {folder}/one.png", "expected a name that ends in .json"),
        ("/system be kind", "the role must be"),
        ("what is <image>?", "the text holds '<image>'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_the_session_goes_on(session, paths, line, told):
    (paths[0].parent / "torn.png").write_bytes(b"\x89PNG torn")
    held = session(line.format(folder=paths[0].parent), QUESTION)
    held.run()
    assert told in held.told[0]
    assert held.told[0].count("\n") == 0
    assert [message["role"] for message in held.chat.messages] == ["user", "assistant"]


def test_reset_help_and_exit(session, paths):
    held = session(f"/image {paths[0]}", QUESTION, f"/image {paths[0]}", "/reset", "/help", "/exit", QUESTION)
    held.run()
    assert held.chat.messages == []
    assert held.prompts[3:] == ["[1 picture] > ", "> ", "> "]
    for command in ("/image PATH", "/system TEXT", "/reset", "/save FILE", "/help", "/exit", "Ctrl-C"):
        assert command in "\n".join(held.told)


def test_an_interruption_ends_the_answer_or_the_line_of_someone_at_a_terminal(session, monkeypatch):
    held = session(KeyboardInterrupt(), QUESTION, QUESTION)
    answer = held.chat.speaker.answer
    interrupted = iter([True, False])

    def stopped(messages, write):
        if next(interrupted):
            raise KeyboardInterrupt
        return answer(messages, write)

    monkeypatch.setattr(held.chat.speaker, "answer", stopped)
    held.run()
    assert len(held.prompts) == 4
    assert held.written[:2] == ["\n", "\n"]
    piped = session(QUESTION, KeyboardInterrupt(), QUESTION, interactive=False)
    with pytest.raises(KeyboardInterrupt):
        piped.run()
    assert len(piped.chat.messages) == 2


def test_answers_do_not_steer_the_terminal():
    assert harmless("a\x1b[2Jb\x07\rc\x9b\u202e é→\n\t") == "a\ufffd[2Jb\ufffd\ufffdc\ufffd\ufffd é→\n\t"


def test_commands_and_paths_are_completed(session, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for name in ("pick me.png", ".hidden"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    complete = session().completions
    assert complete("/s") == ["/system", "/save"]
    assert complete("/image p") == ["/image pick me.png", "/image pictures/"]
    assert complete("/image pick m") == ["/image pick me.png"]
    assert complete("/image .h") == ["/image .hidden"]
    assert complete("/image ") == ["/image pick me.png", "/image pictures/"]
    assert complete("/save ~/pic") == ["/save ~/pick me.png", "/save ~/pictures/"]
    assert complete(f"/image {tmp_path}/pict") == [f"/image {tmp_path}/pictures/"]
    for line in ("", "pick", "/system p", "/fly p", "/image no/such/p", "/image \0"):
        assert complete(line) == []


def test_tab_asks_for_completions(session, tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    before = readline.get_completer(), readline.get_completer_delims()
    try:
        complete_with_tab(session())
        completer = readline.get_completer()
        assert [completer("/s", state) for state in range(3)] == ["/system", "/save", None]
        assert " " not in readline.get_completer_delims()
    finally:
        readline.set_completer(before[0])
        readline.set_completer_delims(before[1])


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, *command):
        self.seen = ""
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where tests run in the background
            os.execv(command[0], command)

    def wait_for(self, pattern, seconds=60):
        """Reads on until the pattern has come, and returns what came before and with it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.screen], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen!r}"
            self.seen += os.read(self.screen, 4096).decode(errors="replace")
        came, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return came

    def type(self, keys):
        os.write(self.screen, keys.encode())

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.screen)


def test_on_a_terminal(session, paths, tmp_path):
    chat = session().chat
    model, processor = chat.speaker.model, chat.speaker.processor
    with torch.no_grad():  # another word is always likelier than the end
        model.language.embed_tokens.weight[processor.end_token_id] = 0
    model.save_pretrained(tmp_path / "model", processor)
    command = ["chat", str(tmp_path / "model"), "--max-new-tokens", "100000"]
    terminal = Terminal(sys.executable, "-m", "pyvlm.cli", *command)
    try:
        terminal.wait_for("> ")
        terminal.type(f"/ima\t {paths[0].parent}/on\t\n")
        assert "one.png" in terminal.wait_for(r"\[1 picture\] > ")
        terminal.type(f"{QUESTION}\n")
        terminal.wait_for(
            r"\w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+"
        )  # the echo and then the answer, word by word
        terminal.type("\x03")
        terminal.wait_for(r"\n> ")
        terminal.type("/reset\n/exit\n")
        _, status = os.waitpid(terminal.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        terminal.end()
