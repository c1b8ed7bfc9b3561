"""The report of a run, or of a sweep: one self-contained HTML page, from its directory's files.

Who lives here: `facts` reads the directory, `charts` draws lines as SVG, `figures` writes numbers
for people, and `page` fills the template page.html.j2 with page.css and page.js; the files called
sweep* do the same for the folder of a sweep, and `seeds` tells what its seeds say (config.js serves
both pages). Nothing here needs devices, a network or the checkpoints.
"""

from jdiff.report.page import render, write
from jdiff.report.sweep_page import write_sweep

__all__ = ["render", "write", "write_sweep"]
