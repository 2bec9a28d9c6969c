"""The page in a real browser: dialogs open, filters work, nothing is refused or broken or overflows."""

import json
import re
import shutil
import subprocess

import pytest

from amg.report import write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """
<script>
const seen = {errors: [], plots: 0, dots: 0};
addEventListener("error", (event) => seen.errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => seen.errors.push("refused " + event.blockedURI));
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll(".sample:not([hidden])")];
  seen.broken = [...document.images].filter((image) => !image.complete || !image.naturalWidth).length;
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.width = innerWidth;
  seen.rows = rows().length;
  seen.sparks = document.querySelectorAll(".sample:not([hidden]) .spark svg").length;
  rows()[0].querySelector("button").click();
  seen.open = document.querySelector("dialog").open;
  const titles = new Set();
  for (let n = 0; n < seen.rows; n++) {
    titles.add(document.querySelector("dialog .meta").textContent);
    seen.plots += document.querySelectorAll("dialog .plot svg").length;
    seen.dots += document.querySelectorAll("dialog .plot circle").length;
    seen.broken += document.querySelectorAll("dialog img:not([src^='data:image/png;base64,'])").length;
    document.querySelector("dialog [data-move='1']").click();
  }
  seen.visited = titles.size;
  document.querySelector("dialog [data-close]").click();
  seen.closed = !document.querySelector("dialog").open;
  document.querySelector(".memorised-only").click();
  seen.memorised = rows().length;
  document.querySelector("input[value=ordinary]").click();
  seen.ordinary = rows().length;
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>
"""
FRAME = """<!doctype html><script>
addEventListener("message", (event) => { document.documentElement.dataset.seen = event.data; });
</script><iframe src="index.html" style="border:0;width:%dpx;height:800px"></iframe>"""


def browse(path, profile, width):
    frame = path.with_name("frame.html")  # Chromium's own window is never narrower than 500 px
    frame.write_text(FRAME % width, encoding="utf-8")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=5000",
        "--window-size=1400,900", "--dump-dom",
    ]  # fmt: skip
    result = subprocess.run([CHROMIUM, *flags, frame.as_uri()], capture_output=True, text=True, timeout=120)
    seen = re.search(r'<html[^>]*data-seen="([^"]*)"', result.stdout)
    assert seen, result.stderr[-2000:]
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(seen[1].replace("&quot;", '"')), console


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_page_works_in_chromium(make, tmp_path, width):
    path = write(make.report(), tmp_path)
    path.write_text(
        path.read_text(encoding="utf-8").replace("<style>", PROBE + "<style>", 1), encoding="utf-8"
    )
    seen, console = browse(path, tmp_path / "profile", width)
    assert seen["errors"] == [] and console == []
    assert seen["broken"] == 0
    assert seen["width"] == width and seen["overflow"] <= 0
    assert (seen["rows"], seen["sparks"], seen["visited"]) == (8, 8, 8)
    assert seen["open"] and seen["closed"]
    assert seen["plots"] == 8 * 2
    assert seen["dots"] == 8 * (40 + 59)  # measured steps of 50 and, with the rewind, of 29 + 44
    assert (seen["memorised"], seen["ordinary"]) == (3, 0)
