"""ComfyUI's real page in headless Chromium.

with Browser(server.url) as page:
    page.load(json.loads(path.read_text()))
    assert not page.missing_nodes()
    page.queue()
    page.screenshot(tmp_path / "graph.png")
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No QUIC, updates or background traffic: the page talks to loopback only, and no test may wait for anything else.
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --window-size=1600,1000"
)
# For a new user the page opens its template gallery over the graph; the map would hide a corner of the pictures. A page
# that brings back the last test's graph would also bring back, late, the dialog about a checkpoint that isn't here.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Workflow.Persist": False}
NO_BANNER = "localStorage.setItem('vueNodesBannerDismissed', 'true')"
READY = "return Boolean(window.app && window.app.graph && window.app.vueAppReady && window.LiteGraph)"
QUEUE = """
const {app} = window
const listeners = []
const finish = (answer) => {
  for (const [kind, listener] of listeners) app.api.removeEventListener(kind, listener)
  window.lastRun = answer
}
window.lastRun = null
for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
  const listener = ({detail}) => finish({kind, detail})
  listeners.push([kind, listener])
  app.api.addEventListener(kind, listener)
}
app.queuePrompt(0).then(
  () => {
    const errors = app.lastNodeErrors
    if (errors && Object.keys(errors).length) finish({kind: "rejected", detail: errors})
  },
  (error) => finish({kind: "rejected", detail: String(error)})
)
"""
MISSING = """
return app.graph.nodes.map((n) => n.type).filter((t) => !(t in LiteGraph.registered_node_types))
"""
SELECT = """
const node = app.graph.nodes.find((n) => n.type === arguments[0])
if (!node) return false
app.canvas.ds.scale = 0.8
app.canvas.centerOnNode(node)
app.canvas.selectItems([node])
return true
"""
DIALOGS = ".p-dialog, .comfy-modal[style*='display: flex'], .p-toast-message"
CLOSE_BUTTONS = ".p-dialog-close-button, .p-dialog [aria-label='Close'], .p-toast-close-button"
INFO_BUTTON = "[data-testid='info-button']"
HELP = ".node-help-content"


class PageError(RuntimeError):
    """The page could not do what was asked."""


def why_not() -> str:
    """Why there is no browser here; empty if there is one."""
    if not any(shutil.which(name) for name in BROWSERS):
        return (
            "Chromium is not installed (Debian: apt-get install chromium chromium-driver), so the page was NOT tested"
        )
    if not shutil.which("chromedriver"):
        return "chromedriver is not installed (Debian: apt-get install chromium-driver), so the page was NOT tested"
    return ""


class Browser:
    """One page with a fresh profile."""

    def __init__(self, url: str, timeout: float = 120, settings: dict[str, Any] | None = None) -> None:
        self.url, self.timeout = url, timeout
        self.alerts: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        answer = requests.post(f"{url}/settings", json=SETTINGS | (settings or {}), timeout=30, proxies={"http": ""})
        answer.raise_for_status()
        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
        for flag in (*FLAGS.split(), f"--user-data-dir={self._profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # Naming the driver keeps Selenium from looking for one on the net.
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(timeout)
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NO_BANNER})
        try:
            self.open()
        except BaseException:
            self.close()
            raise

    def open(self) -> None:
        """Load the page and wait until it has started; it starts empty."""
        self.driver.get(self.url)
        self._wait(lambda: self.driver.execute_script(READY), "the page did not start")
        self._frames()
        self.dismiss()

    def load(self, workflow: dict[str, Any]) -> None:
        """Show a graph in interface format, zoomed to fit; `alerts` then holds what the page complained about."""
        self.alerts.clear()
        script = """
        const done = arguments[arguments.length - 1]
        app.extensionManager.sidebarTab.activeSidebarTabId = null
        app.loadGraphData(JSON.parse(arguments[0])).then(() => done(""), (error) => done(String(error)))
        """
        if error := self.driver.execute_async_script(script, json.dumps(workflow)):
            raise PageError(f"the page refused the graph: {error}")
        self._frames()
        self.dismiss()
        self.fit()

    def fit(self) -> None:
        """Show the whole graph, with nothing selected."""
        self.driver.execute_script("app.canvas.deselectAll()")
        self.driver.execute_script("return app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self._frames()

    def missing_nodes(self) -> list[str]:
        """Types in the graph that the page does not know."""
        missing: list[str] = self.driver.execute_script(MISSING)
        return missing

    def api_prompt(self) -> dict[str, Any]:
        """The graph as the page would queue it."""
        script = "const done = arguments[0]; app.graphToPrompt().then((p) => done(p.output))"
        prompt: dict[str, Any] = self.driver.execute_async_script(script)
        return prompt

    def queue(self, timeout: float = 600) -> str:
        """Press Run, wait for the end, and return the prompt's id."""
        # Asked for again and again, because one call must not last longer than Selenium's own two minutes.
        self.driver.execute_script(QUEUE)
        late = f"the graph did not end within {timeout:.0f} s"
        answer = self._wait(lambda: self.driver.execute_script("return window.lastRun"), late, timeout)
        self._frames()
        if answer["kind"] != "execution_success":
            raise PageError(f"{answer['kind']}: {json.dumps(answer['detail'])[:4000]}")
        return str(answer["detail"]["prompt_id"])

    def open_help(self, node_type: str) -> str:
        """Open the help panel of the first node of this type, as a click on its (i) does, and return its text."""
        if not self.driver.execute_script(SELECT, node_type):
            raise PageError(f"the graph has no {node_type}")
        self._wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, INFO_BUTTON), "no info button over the node", 15)
        self.driver.find_element(By.CSS_SELECTOR, INFO_BUTTON).click()
        return str(self._wait(self._help_text, f"no help for {node_type}", 15))

    def _help_text(self) -> str:
        panels = self.driver.find_elements(By.CSS_SELECTOR, HELP)
        return panels[0].text if panels else ""

    def dismiss(self) -> None:
        """Close the dialogs and messages that lie over the graph, and remember in `alerts` what they said."""
        for attempt in range(10):
            dialogs = [d for d in self.driver.find_elements(By.CSS_SELECTOR, DIALOGS) if d.is_displayed()]
            if not dialogs:
                return
            if attempt == 0:
                self.alerts += [d.text for d in dialogs]
            for button in self.driver.find_elements(By.CSS_SELECTOR, CLOSE_BUTTONS):
                self.driver.execute_script("arguments[0].click()", button)
            self.driver.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
            self._frames()
        raise PageError(f"a dialog does not close: {self.alerts[-1]}")

    def screenshot(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.driver.save_screenshot(os.fspath(path)):
            raise PageError(f"could not write {path}")
        return path

    def errors(self, about: str = "") -> list[str]:
        """What the page has logged as an error since the last call; a fresh stock page logs some 404s of its own."""
        log: list[dict[str, Any]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        messages = [entry["message"] for entry in log if entry["level"] == "SEVERE"]
        return [message for message in messages if about in message]

    def _frames(self) -> None:
        """Let the canvas draw."""
        script = "const done = arguments[0]; setTimeout(() => requestAnimationFrame(() => done()), 500)"
        self.driver.execute_async_script(script)

    def _wait(self, what: Any, message: str, timeout: float | None = None) -> Any:
        try:
            return WebDriverWait(self.driver, timeout or self.timeout, 0.2).until(lambda _: what())
        except TimeoutException as error:
            raise PageError(message) from error

    def close(self) -> None:
        self.driver.quit()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
