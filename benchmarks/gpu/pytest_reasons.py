"""A plugin of pytest that tells why a test, or a file of them, failed when it fails: the list at the end may
never come."""

from typing import Any

REASON = "FAILED BECAUSE "


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message[:500] if crash is not None else str(report.longrepr)[-500:]
        print(f"\n{REASON}{report.nodeid}: {' '.join(reason.split())}", flush=True)


pytest_collectreport = pytest_runtest_logreport
