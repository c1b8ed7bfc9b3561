"""Kinds of experiments: a table that is complete, and nothing else that knows them."""

import json
import pathlib
import re

import pytest

from jdiff import experiment, kinds, runs
from jdiff.defaults import common
from jdiff.errors import UserError

PACKAGE = pathlib.Path(kinds.__file__).parent
NAMES = [name for name in vars(kinds.Kind) if not name.startswith("_")] + ["OPENER"]


@pytest.mark.parametrize("name", kinds.BY_NAME)
def test_every_kind_gives_what_the_loop_asks_for(name):
    kind = kinds.named(name)
    assert [n for n in NAMES if not hasattr(kind, n)] == []
    c = kind.defaults()
    assert c.kind == name and kinds.of(c) is kind
    assert set(c) >= set(common(name))


def test_an_unknown_kind_is_told_with_the_nearest():
    c = experiment.defaults()
    c.kind = "autoencodr"
    with pytest.raises(UserError, match="Did you mean 'autoencoder'"):
        kinds.of(c)


def test_a_run_from_before_there_were_kinds_is_a_denoisers(tmp_path):
    old = json.loads(experiment.defaults().to_json())
    del old["kind"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert runs.read_config(tmp_path).kind == "diffusion"


def test_only_the_table_knows_the_kinds():
    """No other file compares a config's kind with a name."""
    pattern = re.compile(r"\bkind\s*(==|!=|in|not in)\s*[\"'({\[]\s*[\"']?(diffusion|auto|contr)")
    found = [p for p in PACKAGE.rglob("*.py") if pattern.search(p.read_text())]
    assert found == []
