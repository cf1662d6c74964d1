"""Lays a page out in headless Chromium and says what a reader sees of it; without Chromium the test is skipped."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The frame has the width of the screen. A box that scrolls by itself may hold wider things.
WRAPPER = """<iframe src="{page}" style="width: {width}px; height: 2000px; border: 0"></iframe><pre></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, all = (what) => [...page.querySelectorAll(what)]
  all("details").forEach((each) => each.open = true)
  const box = (each) => each.getBoundingClientRect()
  const cut = (each) => !each.closest(".wide *") && (box(each).left < -1 || box(each).right > {width} + 1)
  document.querySelector("pre").textContent = JSON.stringify({{
    cut: all("body *").filter(cut).map((each) => each.outerHTML.slice(0, 99)),
    width: page.documentElement.scrollWidth,
    headline: page.querySelector("h1").innerText,
    axes: all(".ticks").map((axis) => [...axis.children].map((tick) => tick.innerText)),
    plots: all("svg.frontier").map((plot) => [plot, ...plot.querySelectorAll("text")].map((each) => [
      box(each).left, box(each).top, box(each).right, box(each).bottom, each.textContent])),
    lines: box(page.querySelector("h1")).height / parseFloat(getComputedStyle(page.querySelector("h1")).lineHeight),
    columns: all(".answers").map((each) => getComputedStyle(each).gridTemplateColumns.split(" ").length),
  }})
}}</script>"""


def seen(page, width):
    """Facts of the page on a screen of that width in pixels, with everything unfolded.

    `cut` lists the elements that leave the screen at a side, `axes` the numbers below the bars, `plots` the sides of
    each plot and of its labels. `lines` is the height of the headline in lines.
    """
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    wrapper = page.with_name(f"wrapper-{width}.html")
    wrapper.write_text(WRAPPER.format(page=page.name, width=width), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
    profile = f"--user-data-dir={page.with_name('chromium')}"
    command = [CHROMIUM, *options, profile, "--window-size=1500,2000", "--dump-dom", wrapper.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", dom, re.DOTALL)[1]))
