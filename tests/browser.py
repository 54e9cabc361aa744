"""Pages in a headless browser, where one is installed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
MEASURE = """<body style="margin:0"><iframe src="{page}" style="border:0;width:{width}px;
height:900px"></iframe><pre id="found"></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, found = [];
  const width = page.documentElement.clientWidth;
  if (page.documentElement.scrollWidth > width) found.push("the page");
  for (const item of page.body.querySelectorAll("*")) {{
    if (item.closest(".wide")) continue;  // scrolls on its own
    const outside = item.getBoundingClientRect().right > width + 1;
    const cut = item.clientWidth && item.scrollWidth > item.clientWidth + 1;
    if (outside || cut) found.push(item.tagName + " " + item.textContent.slice(0, 40));
  }}
  for (const image of page.images) if (!image.naturalWidth) found.push("image " + image.alt);
  document.getElementById("found").textContent =
    JSON.stringify({{width, cells: page.querySelectorAll("td").length, found}});
}};</script></body>"""


def check_page(page: Path, width: int) -> None:
    """Check that a page fits a screen, loads its pictures and logs no error.

    It is measured in a frame, because headless Chromium has no window narrower than 500 pixels.
    """
    frame = page.with_name(f"frame_{width}.html")
    frame.write_text(MEASURE.format(width=width, page=page.name))
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking"
    options += f" --allow-file-access-from-files --enable-logging=stderr --window-size={width},900"
    command = [str(BROWSER), *options.split(), "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    result = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]))  # type: ignore[index]
    assert result["cells"] > 50
    assert 0 <= width - result["width"] <= 20  # a scroll bar
    assert result["found"] == []
