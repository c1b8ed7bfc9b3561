"""Captioned emoji in six drawing styles, 128 x 128 on white: a small text-to-image set.

The same emoji exists in up to six styles, with skin tones and as man, woman and person: the split
into train and test goes by what is depicted, so that no twin of a test picture is trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from jdiff.data import sources
from jdiff.data.prepare import packages, records

SIZE = 128
STYLES = ("noto", "twemoji", "openmoji", "fluent", "fluent flat", "fluent 3d")
GROUPS = (
    *("Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects"),
    *("People & Body", "Smileys & Emotion", "Symbols", "Travel & Places", "Extras"),
)
TEST_PERCENT = 10
# Vector sets in the order in which they may name a code point.
_VECTOR = {
    "twemoji": "@iconify-json/twemoji",
    "noto": "@iconify-json/noto",
    "openmoji": "@iconify-json/openmoji",
    "fluent flat": "@iconify-json/fluent-emoji-flat",
    "fluent": "@iconify-json/fluent-emoji",
}
_RASTER = {"fluent 3d": "@lobehub/fluent-emoji-3d"}
_TONE = re.compile(r"-(?:medium-light|medium-dark|light|medium|dark)-skin-tone|-tone[1-5]")
_FLUENT_TONE = re.compile(r"-(medium-light|medium-dark|light|medium|dark)$")
_WHO = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "and"}


@dataclasses.dataclass(frozen=True)
class Picture:
    """One drawing: its style, the emoji's name (`man-biking-dark-skin-tone`), and its image."""

    style: str
    name: str
    png: bytes


def prepare_emoji(
    archives: Mapping[str, pathlib.Path], data_dir: Any, progress: packages.Progress
) -> pathlib.Path:
    """About 22,000 emoji: image, caption, name, style, and the Unicode group as label."""
    sets = {style: _read_icons(archives[package]) for style, package in _VECTOR.items()}
    names = _names(sets)
    groups = _groups(sets)
    pictures = [
        *_render(sets, names, progress),
        *_decode(archives[_RASTER["fluent 3d"]], names["by code"], progress),
    ]
    split = split_by_subject(pictures)
    chosen = {s: [p for p, at in zip(pictures, split) if at == s] for s in ("train", "test")}

    def features(tfds):
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIZE, SIZE, 3)),
                "label": tfds.features.ClassLabel(names=GROUPS),
                "style": tfds.features.ClassLabel(names=STYLES),
                "name": tfds.features.Text(),
                "caption": tfds.features.Text(),
            }
        )

    def examples(split: str) -> Iterator[dict[str, Any]]:
        for p in chosen[split]:
            yield {
                "image": Image.open(io.BytesIO(p.png)),
                "label": groups.get(p.name) or groups.get(subject(p.name)) or "Extras",
                "style": p.style,
                "name": p.name,
                "caption": caption(p.style, p.name),
            }

    def check(scratch: pathlib.Path) -> None:
        for s, expected in chosen.items():
            rows = sources.source("emoji", s, scratch, fields=("caption",), in_memory=False)
            found = [rows[i]["caption"] for i in range(len(rows))]
            if sorted(found) != sorted(caption(p.style, p.name) for p in expected):
                raise packages.PrepareError(f"emoji: {s} was not written as drawn")

    progress(f"emoji: writing {len(chosen['train']):,} + {len(chosen['test']):,} pictures")
    image_set = records.ImageSet(
        name="emoji",
        version="1.0.0",
        description=(
            "Captioned emoji in six styles, 128 x 128 on white. Train and test share no subject. "
            "Art: noto Apache-2.0 (Google), twemoji CC BY 4.0 (Twitter), openmoji CC BY-SA 4.0 "
            "(OpenMoji), fluent MIT (Microsoft)."
        ),
        homepage="https://iconify.design",
        citation="",
        features=features,
        splits={s: lambda s=s: examples(s) for s in chosen},
        shuffle=True,
    )
    return records.write(image_set, data_dir, check=check)


def caption(style: str, name: str) -> str:
    """The caption of an emoji, e.g. `twemoji emoji of a man biking, dark skin tone`."""
    tones = [t[1:].replace("-", " ") for t in _TONE.findall(name)]
    words = _TONE.sub("", name).replace("-", " ")
    article = "an" if words[:1] in "aeiou" else "a"
    return ", ".join([f"{style} emoji of {article} {words}", *tones])


def subject(name: str) -> str:
    """What an emoji depicts: its name without skin tones, people's sex, and direction."""
    words = _TONE.sub("", name).removesuffix("-facing-right").split("-")
    return "-".join(w for w in words if w not in _WHO) or "person"


def split_by_subject(pictures: Sequence[Picture]) -> list[str]:
    """`train` or `test` for each picture.

    Subjects that share one identical picture are one group. A group is in the test split if the
    SHA-256 of its alphabetically first subject, modulo 100, is below `TEST_PERCENT`.
    """
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    subjects = [subject(p.name) for p in pictures]
    for name, picture in zip(subjects, pictures):
        pair = find(name), find("picture " + hashlib.sha256(picture.png).hexdigest())
        parent[max(pair)] = min(pair)
    first: dict[str, str] = {}
    for name in subjects:
        root = find(name)
        first[root] = min(name, first.get(root, name))
    return [
        "test" if _percentile(first[find(name)]) < TEST_PERCENT else "train" for name in subjects
    ]


def _percentile(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100


def _read_icons(archive: pathlib.Path) -> dict[str, Any]:
    """An iconify set: `icons` (drawings by key), `chars` (code point -> key), `categories`."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted = {"icons.json", "chars.json", "metadata.json"}
        files = packages.unpack(archive, scratch, lambda n: n.removeprefix("package/") in wanted)
        read = {f.name: json.loads(f.read_text()) for f in files}
    icons = read["icons.json"]
    size = {"width": icons.get("width", 16), "height": icons.get("height", 16)}
    # Hidden drawings are superseded by others of the same set.
    drawn = {k: size | v for k, v in icons["icons"].items() if not v.get("hidden")}
    return {
        "icons": drawn,
        "chars": read.get("chars.json", {}),
        "categories": read.get("metadata.json", {}).get("categories", {}),
    }


def _code(text: str) -> str:
    """A code point sequence without variation selectors, as `1f1e6-1f1e8`."""
    parts = text.lower().replace("_", "-").split("-")
    return "-".join(p.lstrip("0") for p in parts if p != "fe0f")


def _names(sets: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """One name for each emoji over all styles: that of the first set that has its code point.

    Returns, for each style, key -> name, and under "by code", code point -> name.
    """
    by_code: dict[str, str] = {}
    for style, icons in sets.items():
        for code, key in icons["chars"].items():
            by_code.setdefault(_code(code), _spell(style, key))
    names = {"by code": by_code}
    for style, icons in sets.items():
        chars = icons["chars"] or sets["fluent flat"]["chars"]  # both Fluent sets share their keys
        code_of = {key: _code(code) for code, key in chars.items()}
        names[style] = {
            key: by_code.get(code_of.get(key, ""), _spell(style, key)) for key in icons["icons"]
        }
    return names


def _spell(style: str, key: str) -> str:
    return _FLUENT_TONE.sub(r"-\1-skin-tone", key) if style.startswith("fluent") else key


def _groups(sets: Mapping[str, Any]) -> dict[str, str]:
    """Name or subject -> Unicode group, from the categories of the vector sets."""
    known = {re.sub(r"\W+", " ", g): g for g in GROUPS}
    groups: dict[str, str] = {}
    for icons in sets.values():
        for category, keys in icons["categories"].items():
            group = known.get(re.sub(r"\W+", " ", category), "Extras")
            for key in keys:
                groups.setdefault(key, group)
                groups.setdefault(subject(key), group)
    return groups


def _render(
    sets: Mapping[str, Any], names: Mapping[str, Mapping[str, str]], progress: packages.Progress
) -> Iterator[Picture]:
    import resvg_py

    for style in sets:
        icons = sets[style]["icons"]
        progress(f"emoji: drawing {len(icons):,} in the style {style}")
        for key, icon in icons.items():
            png = resvg_py.svg_to_bytes(
                svg_string=_svg(icon),
                width=SIZE,
                height=SIZE,
                background="#ffffff",
                skip_system_fonts=True,  # the same picture on every machine
            )
            with Image.open(io.BytesIO(bytes(png))) as image:
                yield from _picture(style, names[style][key], image.convert("RGB"))


def _svg(icon: Mapping[str, Any]) -> str:
    """A drawing centred in a square, undistorted."""
    width, height = icon["width"], icon["height"]
    side = max(width, height)
    left = icon.get("left", 0) - (side - width) / 2
    top = icon.get("top", 0) - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )


def _decode(
    archive: pathlib.Path, by_code: Mapping[str, str], progress: packages.Progress
) -> Iterator[Picture]:
    with tempfile.TemporaryDirectory() as scratch:
        files = packages.unpack(archive, scratch, lambda n: n.endswith(".webp"))
        progress(f"emoji: reading {len(files):,} in the style fluent 3d")
        for file in sorted(files):
            name = by_code.get(_code(file.stem))
            if name is None:
                continue
            with Image.open(file) as image:
                image = image.convert("RGBA")
                canvas = Image.new("RGBA", image.size, "white")
                canvas.alpha_composite(image)
                small = canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                yield from _picture("fluent 3d", name, small)


def _picture(style: str, name: str, image: Image.Image) -> Iterable[Picture]:
    """The picture, unless it is blank: a drawing that uses what the renderer lacks."""
    low, high = zip(*image.getextrema())
    if min(low) == max(high) == 255:
        return
    buffer = io.BytesIO()
    image.save(buffer, "png")
    yield Picture(style, name, buffer.getvalue())
