"""The report of a run, a sweep or a cascade: one self-contained HTML page, from its files.

Who lives here: `facts` reads the directory, `charts` draws lines as SVG, `figures` writes numbers
for people, and `page` fills the template page.html.j2 with page.css and page.js; the files called
sweep* do the same for the folder of a sweep, and `seeds` tells what its seeds say; those called
cascade* do it for the folder of a cascade. parts.html.j2, config.js and `files` serve all pages.
Nothing here needs devices, a network or the checkpoints.
"""

from jdiff.report.cascade_page import write_cascade
from jdiff.report.page import render, write
from jdiff.report.sweep_page import write_sweep

__all__ = ["render", "write", "write_cascade", "write_sweep"]
