"""Draw README's plot of reward against KL from the last evaluation: `python scripts/readme_plot.py`.

The report's figures take their colours from the page; this one stands alone, so it brings them along, light and dark.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tasks.evals.plots import reward_against_kl

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "artifacts" / "evaluate" / "policies.json"
PAGE = ROOT / "tasks" / "evals" / "report.html.j2"
PLOT = ROOT / "docs" / "reward_against_kl.svg"


def standalone(svg: str, css: str) -> str:
    """The figure as a file of its own: a name space, a width, a background, and the page's two sets of colours."""
    light, dark = (re.findall(r"(--\w+: #\w+)", block) for block in css.split("prefers-color-scheme: dark"))
    style = (
        f"<style>svg{{{';'.join(light)};background:var(--paper);font-family:sans-serif}}"
        f"@media(prefers-color-scheme:dark){{svg{{{';'.join(dark)}}}}}</style>"
    )
    return re.sub(
        r'<svg viewBox="([^"]*)" aria-hidden="true">',
        rf'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        rf'viewBox="\1" width="560">{style}',
        svg,
        count=1,
    )


def main() -> None:
    css = PAGE.read_text(encoding="utf-8").partition("</style>")[0]
    svg = reward_against_kl(json.loads(TABLE.read_text(encoding="utf-8")))
    PLOT.write_text(standalone(svg, css) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
