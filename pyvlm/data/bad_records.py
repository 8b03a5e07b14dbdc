"""Records that cannot be learnt from: told apart by reason, counted, and named."""

from dataclasses import dataclass, field

NAMED = 5  # records of each reason that a report names


class BadRecord(ValueError):
    """A record that is no conversation; `reason` is one of a few, `detail` is what is wrong with this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass
class Report:
    """How many records of a file were read, and which were bad.

    Attributes:
        name: of the file.
        total: records, the bad ones included.
        bad: how many, by reason.
        examples: the first of them, by reason: where they stand, and what is wrong.
    """

    name: str
    total: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        """Bad records."""
        return sum(self.bad.values())

    def add(self, where: str, error: BadRecord) -> None:
        """Counts a bad record; `where` is its line or row."""
        self.bad[error.reason] = self.bad.get(error.reason, 0) + 1
        named = self.examples.setdefault(error.reason, [])
        if len(named) < NAMED:
            named.append(f"{where}: {error.detail}" if error.detail else where)

    def summary(self, verb: str = "skipped") -> str:
        """One line: how many, and of each reason, the commonest first, how many and the first of them."""
        line = f"{self.name}: {self.skipped:,} of {self.total:,} records {verb}"
        reasons = sorted(self.bad.items(), key=lambda item: -item[1])
        listed = []
        for reason, count in reasons:
            named = self.examples[reason]
            more = ["…"] if count > len(named) else []
            listed.append(f"{count:,} {reason} ({', '.join([*named, *more])})")
        return f"{line}: {', '.join(listed)}" if listed else line
