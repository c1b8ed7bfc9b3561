"""The report of a run: one self-contained HTML page, from the files of its directory.

Who lives here: `facts` reads the directory, `charts` draws lines as SVG, `figures` writes numbers
for people, and `page` fills the template page.html.j2 with page.css and page.js. Nothing here needs
jax, a network or the checkpoints.
"""

from jdiff.report.page import render, write

__all__ = ["render", "write"]
