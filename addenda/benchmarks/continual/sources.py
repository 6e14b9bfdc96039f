"""The stream that a configuration means: its images are found and dealt out, and none is read yet."""

from __future__ import annotations

from pathlib import Path

from addenda.benchmarks.continual.config import StreamConfig, read_config
from addenda.benchmarks.continual.data_config import Core50, Cub200, Digits, FiveDatasets, Folders, Split, Torchvision
from addenda.benchmarks.continual.experiences import by_class, by_set, limited
from addenda.benchmarks.continual.known_sets import open_core50, open_cub200, open_torchvision
from addenda.benchmarks.continual.sets import ImageSet, open_folder
from addenda.benchmarks.continual.stream import Stream
from addenda.benchmarks.digits import PAIRS, digits
from addenda.learner.data import open_images

NOT_MNIST = "https://github.com/facebookresearch/Adversarial-Continual-Learning/raw/main/data/notMNIST.zip"


def build_stream(config: StreamConfig, data_root: Path | None = None, seed: int = 0) -> Stream:
    """Builds a stream.

    Args:
        config: says which.
        data_root: where a relative `root` is looked for; None looks in the configuration's own folder.
        seed: of every draw: of the test part where a set has none, and of the images under a limit.

    Raises:
        DataError: images are missing, or cannot be dealt out as asked.
    """
    return limited(_whole(config, data_root or config.folder, seed), config.limit, config.test_limit, seed)


def folder_stream(folder: Path, num_experiences: int, seed: int = 0) -> Stream:
    """Builds a stream of any folder with one folder of images for each class.

    Args:
        folder: the class folders, or train/ and test/ that hold them.
        num_experiences: how many experiences share the classes.
        seed: of the test part where the folder has none.

    Raises:
        DataError: it cannot be learned from, or its classes do not divide so.
    """
    return build_stream(read_config(folder, {"data": {"num_experiences": num_experiences}}), seed=seed)


def _whole(config: StreamConfig, base: Path, seed: int) -> Stream:
    data = config.data
    if isinstance(data, Digits):
        return by_set(config.name, _digit_pairs(seed), shared_labels=True)
    root = (base / data.root).absolute()
    if isinstance(data, Folders):
        sets = [open_folder(Path(one).name, root / one, seed, data.address) for one in data.sets]
        return by_set(config.name, sets, data.shared_labels)
    if isinstance(data, FiveDatasets):
        four = [open_torchvision(n, root, config.download) for n in ("cifar10", "mnist", "fashion_mnist", "svhn")]
        return by_set(config.name, [*four, open_folder("notMNIST", root / "notMNIST", seed, NOT_MNIST)], False)
    if isinstance(data, Core50):
        return by_set(config.name, open_core50(root, data.scenario, data.run, config.download), shared_labels=True)
    images = _one_set(config, data, root, seed)
    return by_class(config.name, images, data.num_experiences, data.class_order, data.first)


def _one_set(config: StreamConfig, data: Split | Torchvision | Cub200, root: Path, seed: int) -> ImageSet:
    if isinstance(data, Split):
        return open_folder(root.name, root, seed, data.address)
    if isinstance(data, Torchvision):
        return open_torchvision(data.dataset, root, config.download)
    return open_cub200(root, config.download)


def _digit_pairs(seed: int) -> list[ImageSet]:
    return [
        ImageSet(f"digits-{a}{b}", *(open_images(digits((a, b), test, seed)) for test in (False, True)))
        for a, b in PAIRS
    ]
