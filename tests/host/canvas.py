"""What lies on the page's canvas: where nodes are, what they look like, and the gallery that graphs are opened from."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence

from browser import Browser, PageError
from PIL import Image
from selenium.common.exceptions import NoSuchElementException
from selenium.webdriver.common.by import By

Box = tuple[float, float, float, float]
"""left, top, width, height"""

BOXES = """
const ids = arguments[0]
const box = (b) => Array.from(b).map(Number)
return app.graph.nodes
  .filter((n) => !ids.length || ids.includes(n.id))
  .map((n) => [n.id, n.title, box(n.boundingRect)])
"""
GROUPS = "return app.graph.groups.map((g) => Array.from(g.boundingRect).map(Number))"
VIEW = """
const [left, top, width, height, scale] = arguments
const rect = app.canvas.canvas.getBoundingClientRect()
const side = 70, head = 150
app.canvas.deselectAll()
app.canvas.ds.scale = scale
app.canvas.ds.offset = [(side - rect.left) / scale - left, (head - rect.top) / scale - top]
app.canvas.setDirty(true, true)
return [side, head, width * scale, height * scale]
"""
SHARP = """
app.resizeCanvas(app.canvas.canvas)  // it does not notice a change of the pixel ratio alone
const canvas = app.canvas.canvas
return Math.abs(canvas.width / canvas.getBoundingClientRect().width - arguments[0]) < 0.05
"""
IMAGES = """
return app.graph.nodes
  .filter((n) => n.type === "PreviewImage" || n.type === "SaveImage")
  .map((n) => [n.id, (n.imgs || []).filter((i) => i.complete && i.naturalWidth > 0).length])
"""
THUMBNAILS = """
return Array.from(document.querySelectorAll("[data-testid^=template-workflow-]")).map((card) => [
  card.dataset.testid.slice("template-workflow-".length),
  Array.from(card.querySelectorAll("img")).some((i) => i.complete && i.naturalWidth > 0 && !i.src.includes("default-template")),
])
"""


def boxes(page: Browser, ids: Sequence[int] = ()) -> dict[tuple[int, str], Box]:
    """Where nodes are, title bars included, by (id, title)."""
    found = page.driver.execute_script(BOXES, list(ids))
    return {(i, title): (box[0], box[1], box[2], box[3]) for i, title, box in found}


def overlap(a: Box, b: Box) -> bool:
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))


def picture(
    page: Browser, ids: Sequence[int] = (), scale: float = 1.0, pad: int = 14, sharpness: float = 2.0
) -> Image.Image:
    """These nodes, or all with their groups, as the canvas shows them, cut out of the page."""
    rectangles = list(boxes(page, ids).values())
    if not ids:
        rectangles += [tuple(g) for g in page.driver.execute_script(GROUPS)]
    left, top = (min(r[i] for r in rectangles) - pad for i in (0, 1))
    right, bottom = (max(r[i] + r[i + 2] for r in rectangles) + pad for i in (0, 1))
    width, height = right - left, bottom - top
    window = {"width": max(1280, int(width * scale) + 140), "height": max(720, int(height * scale) + 260)}
    device = window | {"deviceScaleFactor": sharpness, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    page._wait(lambda: page.driver.execute_script(SHARP, sharpness), "the canvas did not follow the window", 60)
    x, y, w, h = page.driver.execute_script(VIEW, left, top, width, height, scale)
    page._frames()
    page._frames()
    shot = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    return shot.crop(tuple(round(v * sharpness) for v in (x, y, x + w, y + h)))


def shown_images(page: Browser) -> dict[int, int]:
    """How many loaded pictures each preview shows."""
    return {i: n for i, n in page.driver.execute_script(IMAGES)}


def open_gallery(page: Browser, pack: str) -> dict[str, bool]:
    """Browse Templates at this pack: its graphs, and whether each shows a thumbnail of its own."""
    page.driver.execute_script("return app.extensionManager.command.execute('Comfy.BrowseTemplates')")

    def entry() -> bool:
        try:
            button = page.driver.find_element(By.XPATH, f"//div[@role='button'][.//span[normalize-space()='{pack}']]")
        except NoSuchElementException:
            return False
        page.driver.execute_script("arguments[0].scrollIntoView(); arguments[0].click()", button)
        return True

    page._wait(entry, f"no {pack} in the template gallery", 60)

    def scroll_to(card: str) -> None:
        page.driver.execute_script(
            "const all = document.querySelectorAll('[data-testid^=template-workflow-]');"
            f"if (all.length) all[{card}].scrollIntoView()"
        )

    seen: dict[str, bool] = {}

    def cards() -> bool:
        """Pictures are there while they are in view: look at both ends in turn."""
        for card in ("0", "all.length - 1"):
            scroll_to(card)
            time.sleep(1)
            for name, shows in page.driver.execute_script(THUMBNAILS):
                seen[name] = seen.get(name, False) or shows
        return bool(seen) and all(seen.values())

    with contextlib.suppress(PageError):
        page._wait(cards, "thumbnails do not show", 30)
    scroll_to("0")
    page._frames()
    return seen


def open_template(page: Browser, name: str) -> None:
    """Click a card of the open gallery and wait until its graph is there."""
    page.driver.execute_script("app.graph.clear()")
    page.driver.find_element(By.CSS_SELECTOR, f"[data-testid='template-workflow-{name}']").click()
    page._wait(lambda: page.driver.execute_script("return app.graph.nodes.length > 0"), f"{name} did not open", 60)
    page._frames()
    page.alerts.clear()
    page.dismiss()
