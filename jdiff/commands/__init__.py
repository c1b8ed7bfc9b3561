"""The commands of the command line, one a file.

Who may live here: modules with SUMMARY (one line), DESCRIPTION, EXAMPLES (texts for --help),
configure(parser) and run(args) -> exit code. They read and check words, call the rooms above the
ground floor, and say where the results lie. Heavy imports happen inside run.
"""

from types import ModuleType

from jdiff.commands import (
    encode,
    evaluate,
    generate_text,
    jobs,
    launch,
    plan,
    prepare,
    report,
    sample,
    sweep,
    train,
)

#: Commands by name, in the order of the help.
ALL: dict[str, ModuleType] = {
    "train": train,
    "sample": sample,
    "generate": generate_text,
    "evaluate": evaluate,
    "report": report,
    "plan": plan,
    "sweep": sweep,
    "launch": launch,
    "jobs": jobs,
    "prepare": prepare,
    "encode": encode,
}
