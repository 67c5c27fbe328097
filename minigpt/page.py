"""A page of HTML that stands alone: no scripts, nothing to fetch; for screens, phones and paper, light and dark."""

from __future__ import annotations

from html import escape


def page(title: str, body: str) -> str:
    """The page of a title and of HTML."""
    title = escape(printable(title))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def printable(name: str) -> str:
    """The name with what could steer a terminal written out; the joiners of Persian and of Indian scripts stay."""
    return "".join(char if char.isprintable() or char in "\u200c\u200d" else repr(char)[1:-1] for char in name)


def table(head: list[str], *bodies: list[list[str]]) -> str:
    """Groups of rows, of cells of HTML; the first of a row names it."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    rows = ["".join(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
                    for name, *cells in body) for body in bodies]
    return (f'<div class="wide"><table>\n<thead><tr>{columns}</tr></thead>\n'
            f'{"".join(f"<tbody>{body}</tbody>" for body in rows)}\n</table></div>')


STYLE = """
:root { color-scheme: light dark; --page: 255 255 255; --ink: 26 26 26; --faint: 208 208 208; --heat: 122 176 245 }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: 18 20 24; --ink: 236 236 236; --faint: 68 72 80; --heat: 28 78 190 }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem;
  background: rgb(var(--page)); color: rgb(var(--ink)); overflow-wrap: break-word }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
dl { display: flex; flex-wrap: wrap; gap: 1rem 2rem } dd { margin: 0; font-size: 1.5rem }
dd, td { font-variant-numeric: tabular-nums }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid rgb(var(--faint)) }
th { font-weight: 600 }
th:first-child { text-align: left; max-width: min(16rem, 40vw); position: sticky; left: 0;
  background: rgb(var(--page)) }
tbody + tbody { border-top: 2px solid rgb(var(--ink)) }
.matrix thead th + th { max-width: 6rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.matrix td { background: rgb(var(--heat) / var(--share)) }
td .text { white-space: pre-wrap; text-align: left; min-width: min(24rem, 60vw); font-family: ui-monospace, monospace }
td { vertical-align: top }
svg { width: 100%; max-width: 26rem; height: auto }
svg rect { fill: rgb(var(--heat)); stroke: rgb(var(--page)) }
svg circle, svg text { fill: rgb(var(--ink)) } svg text { font-size: 13px; text-anchor: middle }
svg path { fill: none; stroke: rgb(var(--ink)) } svg .diagonal { stroke-dasharray: 5 4 }
@media print {
  body { max-width: none; font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .wide { overflow: visible } tr, svg { break-inside: avoid } th:first-child { max-width: 16rem; position: static }
}
"""
