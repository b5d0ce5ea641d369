"""How the report and its pictures look: one style sheet, two palettes."""

from __future__ import annotations

import re

_LIGHT = {
    "ink": "#1b2230", "soft": "#5a6577", "rule": "#dfe4ec", "paper": "#ffffff", "panel": "#f5f7fa",
    "a": "#2b66d9", "b": "#0f8a6d", "c": "#8792a5", "good": "#14713a", "bad": "#b3261e",
}  # fmt: skip
_DARK = {
    "ink": "#e6eaf1", "soft": "#a3aec0", "rule": "#333c4a", "paper": "#12161d", "panel": "#1a202a",
    "a": "#7ba7ff", "b": "#4fd0ad", "c": "#8a95a8", "good": "#6fd695", "bad": "#ff8f86",
}  # fmt: skip

_CHARTS = """
text{font-family:system-ui,sans-serif;font-size:12px;fill:var(--soft)}
.ink{fill:var(--ink)}.paper{fill:var(--paper)}.cell{fill:var(--panel)}
.rule{stroke:var(--rule);stroke-width:1}
.mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:4 3}
.line-a,.line-b,.line-c{fill:none;stroke-width:2;stroke-linejoin:round}
.line-a{stroke:var(--a)}.line-b{stroke:var(--b)}.line-c{stroke:var(--c)}
.fill-a{fill:var(--a)}.fill-b{fill:var(--b)}.fill-c{fill:var(--c)}
"""

_PAGE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem;
 color:var(--ink);background:var(--paper);overflow-wrap:anywhere;
 -webkit-print-color-adjust:exact;print-color-adjust:exact}
h1{margin:0;line-height:1.2}h2{margin:2.75rem 0 .75rem;border-top:1px solid var(--rule);padding-top:1.25rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}p{margin:.5rem 0}small,.soft,figcaption{color:var(--soft)}
.verdict{font-size:1.15rem;margin:1rem 0}.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.75rem;margin:1.25rem 0}
.tile{background:var(--panel);border-radius:.5rem;padding:.75rem 1rem}
.tile b{display:block;font-size:1.5rem;line-height:1.25}.tile small{display:block;line-height:1.35}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1.25rem 2rem}
figure{margin:0;min-width:0;break-inside:avoid}figure h3{margin:0 0 .25rem}
figcaption{font-size:.875rem;line-height:1.4;margin-top:.25rem}
svg{display:block;width:100%;height:auto;max-width:30rem;overflow:visible}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .75rem;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap;font-weight:400;
 overflow-wrap:normal}
th:first-child,td:first-child{text-align:left;padding-left:0}thead th{color:var(--soft);font-size:.875rem}
tr{break-inside:avoid}
.figures>div>:first-child{margin-top:0}
td bdi,th bdi{display:inline-block;white-space:normal;max-width:16rem;overflow-wrap:anywhere}
td small,th small{display:block;white-space:normal;min-width:7rem}
.mistakes{list-style:none;margin:0;padding:0;display:grid;gap:.75rem}
.mistakes li{background:var(--panel);border-radius:.5rem;padding:.75rem 1rem;break-inside:avoid}
.mistakes blockquote{margin:0 0 .35rem;unicode-bidi:plaintext;text-align:start}
pre{background:var(--panel);border-radius:.5rem;padding:1rem;font-size:.8125rem;white-space:pre-wrap}
code{font-size:.9em}
@media print{body{max-width:none;padding:0;font-size:10.5pt}h2{break-after:avoid}
 .figures{grid-template-columns:1fr 1fr}svg{max-width:100%}.scroll{overflow:visible}th,td{padding:.2rem .4rem}
 .wide th,.wide td{white-space:normal}}
"""


def write_page_style() -> str:
    """Return the style sheet of the page: light or dark as the reader's system is, light on paper."""
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_declare(_DARK)}}}}}"
    return f":root{{{_declare(_LIGHT)}}}{dark}{_CHARTS}{_PAGE}"


def write_picture_style() -> str:
    """Return the style sheet of a chart by itself, with colours for white paper instead of variables."""
    return re.sub(r"var\(--([a-z]+)\)", lambda found: _LIGHT[found.group(1)], _CHARTS)


def _declare(palette: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in palette.items())
