"""A plugin of pytest that tells why a test failed when it fails: the list at the end may never come."""

from typing import Any

REASON = "FAILED BECAUSE "


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash is not None else str(report.longrepr)
        print(f"\n{REASON}{report.nodeid}: {' '.join(reason.split())[:500]}", flush=True)
