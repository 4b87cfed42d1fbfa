"""What several test files share: the checkpoint under test, the sample images, and the rule that skips GPU tests.

Does not know: any one module's tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

from benchmarks.servers.service_process import ServiceProcess
from service.model.checkpoint import Calibration, Canary, Checkpoint, CheckpointMetadata, load_checkpoint, save_checkpoint
from service.model.images import InputSpec, decode_image
from service.model.network import ModelConfig, ResNet18, build_model, config_dict, weights_of
from service.settings import DEFAULT_CHECKPOINT
from training.data.augment import normalise
from training.evaluation.calibrate import activation_ranges, predict_logits

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# A busy machine is no reason to fail: no test asserts how long an example takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where torch finds no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def image_paths() -> list[Path]:
    """CIFAR-10 test images as PNG, four of each class, named ``<class>-<number>.png``."""
    return sorted((Path(__file__).parent / "images").glob("*.png"))


@pytest.fixture(scope="session")
def sample_images(image_paths: list[Path]) -> NDArray[np.uint8]:
    """The same images decoded: uint8 (40, 3, 32, 32)."""
    return np.stack([decode_image(path.read_bytes(), InputSpec()) for path in image_paths])


@pytest.fixture(scope="session")
def checkpoint_path(
    tmp_path_factory: pytest.TempPathFactory, image_paths: list[Path], sample_images: NDArray[np.uint8]
) -> Path:
    """The checkpoint in the repository, or where there is none yet, a stand-in that knows the sample images by heart.

    The stand-in has random filters, batch-norm statistics and a head fitted to the sample images, int8 ranges and a
    canary, so everything but the accuracy on other images can be tested with it.
    """
    if DEFAULT_CHECKPOINT.exists():
        return DEFAULT_CHECKPOINT
    torch.manual_seed(0)
    config, spec = ModelConfig(num_classes=len(CLASS_NAMES)), InputSpec()
    model = build_model("resnet18", config)
    assert isinstance(model, ResNet18)
    images = torch.from_numpy(sample_images)
    labels = torch.tensor([CLASS_NAMES.index(path.name.split("-")[0]) for path in image_paths])
    fit_to(model, images, labels, spec)
    path = tmp_path_factory.mktemp("checkpoint") / DEFAULT_CHECKPOINT.name
    save_checkpoint(
        path,
        weights_of(model),
        CheckpointMetadata(
            name="resnet18-cifar10",
            architecture="resnet18",
            config=config_dict(config),
            class_names=CLASS_NAMES,
            input=spec,
            calibration=Calibration(activation_max=activation_ranges(model, images, spec)[0]),
        ),
        canary=Canary(sample_images[::5], predict_logits(model, images[::5], spec).softmax(1).numpy()),
    )
    return path


@pytest.fixture(scope="session")
def checkpoint(checkpoint_path: Path) -> Checkpoint:
    """``checkpoint_path``, loaded."""
    return load_checkpoint(checkpoint_path)


@torch.no_grad()
def fit_to(model: ResNet18, images: torch.Tensor, labels: torch.Tensor, spec: InputSpec) -> None:
    """Set the batch-norm statistics, and solve for a head that knows uint8 images (N, 3, H, W) and int64 labels (N,)."""
    inputs = normalise(images, spec)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of this one batch, whole
    model.train()(inputs)
    model.eval()
    features = model.pool(model.stages(model.stem(inputs))).flatten(1)
    centred = features - features.mean(0)
    targets = 6.0 * torch.nn.functional.one_hot(labels, model.config.num_classes).float()
    gram = centred @ centred.t()
    ridge = 0.1 * gram.trace() / len(labels) * torch.eye(len(labels))
    weight = torch.linalg.solve(gram + ridge, targets - targets.mean(0)).t() @ centred
    model.head.weight.copy_(weight[:, :, None, None])
    assert model.head.bias is not None, "the head has a bias"
    model.head.bias.copy_(targets.mean(0) - weight @ features.mean(0))


@pytest.fixture(scope="session")
def service(checkpoint_path: Path) -> Iterator[ServiceProcess]:
    """The real service with its default settings, one for all tests that do not change it."""
    with ServiceProcess(checkpoint_path) as running:
        yield running
