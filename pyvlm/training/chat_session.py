"""`pyvlm chat` in a terminal: questions, commands, answers word by word."""

import os
from collections.abc import Callable
from pathlib import Path

from pyvlm.training.chat import Chat

Line = Callable[[str], None]


class ChatSession:
    """Reads lines and answers them until their end; what cannot be done is told, and the session goes on.

    Args:
        chat: the conversation.
        read: gives the next line, shown the prompt; EOFError ends the session.
        write: gets the pieces of an answer.
        tell: gets one line about what was done or cannot be.
        interactive: there is someone at a terminal: Ctrl-C stops an answer, or clears a line, and the session
            goes on. Otherwise it ends the session.
    """

    def __init__(
        self, chat: Chat, read: Callable[[str], str], write: Line, tell: Line, interactive: bool
    ) -> None:
        self.chat, self.read, self.write, self.tell = chat, read, write, tell
        self.interactive = interactive
        self.done = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/image": ("PATH", "show a picture with the next question", self._image),
            "/system": (
                "TEXT",
                "begin the conversation with a system message; no text: with none",
                self._system,
            ),
            "/reset": ("", "forget all rounds and pictures", self._reset),
            "/save": ("FILE", "write the conversation as .json or .jsonl", self._save),
            "/help": ("", "show this", self._help),
            "/exit": ("", "end, as does Ctrl-D", self._exit),
        }

    def run(self) -> None:
        """Answers line after line; blank ones are passed over."""
        while not self.done:
            try:
                line = self.read(self._prompt()).strip()
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.answer(line)
            except EOFError:
                return
            except ValueError as error:
                self.tell(" ".join(str(error).split()))
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.write("\n")

    def answer(self, question: str) -> None:
        """Writes the answer as it comes, and ends its line."""
        self.chat.ask(question, lambda piece: self.write(harmless(piece)))
        self.write("\n")

    def command(self, line: str) -> None:
        """Does what a line that begins with "/" asks for.

        Raises:
            ValueError: it cannot be done, or there is no such command.
        """
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ValueError(f"{name} is unknown; expected one of {', '.join(self._commands)}")
        self._commands[name][2](rest.strip())

    def completions(self, line: str) -> list[str]:
        """All lines that the beginning of a command can become: its name, or the path behind it."""
        name, space, rest = line.partition(" ")
        if not space:
            return [
                command for command in self._commands if line.startswith("/") and command.startswith(line)
            ]
        if self._commands.get(name, ("",))[0] not in ("PATH", "FILE"):
            return []
        folder, beginning = os.path.split(rest)
        try:
            entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
        except OSError:
            return []
        return [
            f"{name} {os.path.join(folder, entry.name)}{'/' if entry.is_dir() else ''}"
            for entry in entries
            if entry.name.startswith(beginning) and (beginning or not entry.name.startswith("."))
        ]

    def _prompt(self) -> str:
        count = len(self.chat.pending)
        return f"[{count} picture{'s' if count > 1 else ''}] > " if count else "> "

    def _image(self, text: str) -> None:
        self.chat.add_image(_path(text, "/image"))

    def _system(self, text: str) -> None:
        self.chat.set_system(text or None)

    def _reset(self, _: str) -> None:
        self.chat.reset()

    def _save(self, text: str) -> None:
        path = _path(text, "/save")
        self.chat.save(path)
        self.tell(f"saved {path}")

    def _help(self, _: str) -> None:
        for name, (argument, explanation, _method) in self._commands.items():
            self.tell(f"{f'{name} {argument}':<14} {explanation}")
        self.tell("anything else is a question; Ctrl-C stops an answer")

    def _exit(self, _: str) -> None:
        self.done = True


def _path(text: str, command: str) -> Path:
    """A path as it was typed, or dropped onto the terminal in quotes."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if not text:
        raise ValueError(f"{command} needs a path behind it")
    return Path(text).expanduser()


def harmless(text: str) -> str:
    """Text that a terminal shows and does not obey: no control characters but line ends and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def complete_with_tab(session: ChatSession) -> None:
    """Tab completes commands and paths where Python has readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        return dict(enumerate(session.completions(text))).get(state)

    readline.set_completer_delims("")  # a path may hold blanks
    readline.set_completer(complete)
    editline = "libedit" in (readline.__doc__ or "")  # what macOS has in its place
    readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: complete")
