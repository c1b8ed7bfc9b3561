"""JSON files that others wrote: an object is read, anything else is one clear line."""

import pytest

from jdiff import jsonfile
from jdiff.errors import UserError


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "é", "n": [1, null]}', encoding="utf-8")
    assert jsonfile.read(tmp_path / "a.json") == {"name": "é", "n": [1, None]}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("", "is not JSON"),
        ('{"cut": ', "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        ("[1]", "is not a JSON object but list"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (None, "is not there"),
        ("folder", "cannot be read"),
    ],
)
def test_anything_else_is_refused_by_its_path(held, message, tmp_path):
    path = tmp_path / "config.json"
    if held == "folder":
        path.mkdir()
    elif held is not None:
        path.write_bytes(held.encode() if isinstance(held, str) else held)
    with pytest.raises(UserError, match=rf"config\.json .*{message}"):
        jsonfile.read(path)
