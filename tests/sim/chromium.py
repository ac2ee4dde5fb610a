"""Debian's chromium without a screen: what a page becomes when it is opened, what it complains of, and what it fetches."""

import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

REMEDY = "NOT TESTED, chromium is missing: apt-get install chromium, as root (`make browser` does so)"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    "--window-size=1200,3600",
    "--virtual-time-budget=5000",
    "--dump-dom",
]
TIMEOUT_S = 60


@dataclass(frozen=True)
class Opened:
    """`fetched`: URLs beyond the file that the page asked for, refused or not; the browser's own are not among them."""

    dom: "Dom"
    console: list[str]
    fetched: list[str]


class Dom(HTMLParser):
    """Classes and texts under each element with an id of interest, as rendered."""

    def __init__(self, ids: tuple[str, ...]) -> None:
        super().__init__()
        self.ids, self.at = ids, ""
        self.classes: dict[str, list[str]] = {i: [] for i in ids}
        self.texts: dict[str, list[str]] = {i: [] for i in ids}
        self.buttons: set[str] = set()
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._script = tag in ("script", "style")
        if found.get("id") in self.ids:
            self.at = found["id"] or ""
        elif self.at:
            self.classes[self.at].append(found.get("class") or "")
        if "modebar-btn" in (found.get("class") or ""):
            self.buttons.add(found.get("data-title") or "")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self.at and data.strip() and not self._script:
            self.texts[self.at].append(data.strip())


def path() -> str | None:
    return shutil.which("chromium")


def open_page(page: Path, profile: Path, ids: tuple[str, ...]) -> Opened:
    """Writes a screenshot beside the page. `profile`: a new folder."""
    browser = path()
    assert browser is not None, REMEDY
    net = profile / "net.json"
    command = [browser, *FLAGS, f"--user-data-dir={profile / 'user'}", f"--log-net-log={net}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--screenshot={page.with_suffix('.png')}", page.as_uri()]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = run.communicate(timeout=TIMEOUT_S)
    finally:
        if run.poll() is None:  # with its children, which hold the pipes
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert run.returncode == 0, err[-2000:]
    dom = Dom(ids)
    dom.feed(out)
    events = [e.get("params", {}) for e in json.loads(net.read_text())["events"]]
    asked = {e["url"] for e in events if "url" in e and e.get("initiator", "not an origin") != "not an origin"}
    return Opened(dom, re.findall(r"CONSOLE[:(].*", err), sorted(u for u in asked if not u.startswith(("data:", "file:", "blob:"))))
