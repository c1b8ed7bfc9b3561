"""What a config can train: `config.kind`, and the module that knows how. Nothing else knows kinds.

The training loop, run directories, plans, sweeps, `jdiff evaluate` and reports go through `of`, so
that every kind is resumed, averaged, split over devices, planned and reported in the same way.
"""

import importlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import ml_collections

from jdiff.errors import choose
from jdiff.parallel.layout import Layout
from jdiff.pytree import PyTree

#: The module of each kind, imported when a config asks for it.
BY_NAME = {
    "diffusion": "jdiff.diffusion",
    "autoencoder": "jdiff.first_stage.kind",
    "contrastive": "jdiff.contrastive.kind",
}


class Kind(Protocol):
    """What such a module gives.

    An experiment, which `build` makes, is a value with the attributes `config`, `optimizer`,
    `learning_rate`, `averages`, `layout` and `empty` (what became of the empty text, kept with the
    run; {} unless training needs it), and the methods

        init(key) -> params                     fresh weights, a tree of nested dicts
        shapes() -> params                      their shapes, without drawing them
        placed(tree) -> shardings               of the weights, or of a training state
        on(layout) -> experiment                the same on other devices
        loss(params, key, batch, state)         `[B]`, or any shape: its mean is minimised; or
                                                (that, {"name": scalar}), figures to be logged too
    """

    #: What opens such a run from Python, for messages: "jdiff.load_run".
    OPENER: str

    def defaults(self) -> ml_collections.ConfigDict:
        """Every field of such a config, `kind` among them; `jdiff.defaults.common` begins one."""

    def layout(self, config: ml_collections.ConfigDict, mesh: Any = None) -> Layout:
        """Of config.mesh on all devices, or on another mesh."""

    def frozen(
        self, config: ml_collections.ConfigDict, info: Any, sizes: Mapping[str, int] | None = None
    ) -> tuple[PyTree, Any]:
        """(weights that the loss needs and training leaves as they are, or None; what `build`
        takes as its teacher): opened for training, on a mesh of these sizes; of a plan, which has
        none, their shapes are enough."""

    def build(
        self, config: ml_collections.ConfigDict, info: Any, teacher: Any = None,
        layout: Layout | None = None,
    ) -> Any:  # fmt: skip
        """The experiment on the data that `info` describes; computes nothing."""

    def check(self, exp: Any, info: Any) -> None:
        """Traces its network on a batch of the data, so that errors come early."""

    def check_later(self, exp: Any) -> None:
        """Raises the errors of what is done with a trained model, hours before it is trained."""

    def drawing(self, exp: Any, config: ml_collections.ConfigDict, key: Any, info: Any) -> Any:
        """The `jdiff.pictures.Drawing` of the pictures of training."""

    def open(self, workdir: pathlib.Path, **options: Any) -> Any:
        """A trained run, for `assess`: options as of `runs.load_run`."""

    def assess(
        self, run: Any, *, num: int | None, seed: int, batch: int | None,
        sampling: dict[str, Any] | None, features: str | None, metrics: Iterable[str] | None,
        console: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Measures an opened run, writes evaluation.json, and returns what it holds."""

    def table(self, result: dict[str, Any]) -> Any:
        """A rich table of that."""

    def page(self, facts: Any) -> Any:
        """The `jdiff.report.page.Words` of the run's report."""


def of(config: ml_collections.ConfigDict) -> Kind:
    """The kind of a config; diffusion, if it was written before there were others.

    Raises:
      UserError: an unknown kind (the nearest is named).
    """
    return named(config.get("kind", "diffusion"))


def named(name: str) -> Kind:
    """The kind of this name.

    Raises:
      UserError: there is none.
    """
    return importlib.import_module(BY_NAME[choose("config.kind", name, BY_NAME)])
