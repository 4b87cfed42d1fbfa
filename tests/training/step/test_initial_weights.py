"""A run that begins with the weights of a trained network: what it takes over, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from service.model.architectures import MODELS
from service.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from service.model.images import InputSpec
from service.model.network import Network, model_from_checkpoint
from tests.support.tiny_network import tiny_checkpoint, tiny_images
from tests.training.image_folders import write_classes
from tests.training.run.test_resume import assert_continues
from tests.training.tiny_run import TINY
from training.__main__ import main
from training.data.augment import normalise
from training.data.dataset import Source
from training.data.folder import load_source
from training.errors import RunError
from training.recipes import RECIPES
from training.run.run_folder import CHECKPOINT_FILE
from training.step.initial_weights import begin_from, load_initial
from training.step.network import build_model
from training.train import RunOptions, train


def network_like(checkpoint: Checkpoint, class_names: tuple[str, ...]) -> Network:
    """The same network for other classes, with weights of its own."""
    torch.manual_seed(1)
    config = replace(checkpoint.metadata.config, num_classes=len(class_names))
    return build_model("resnet18", config).eval()


def batch_for(checkpoint: Checkpoint) -> torch.Tensor:
    return normalise(torch.from_numpy(tiny_images()), checkpoint.metadata.input)


# What is taken over


def test_a_network_of_the_same_classes_begins_with_the_same_answers() -> None:
    """Every weight and every running statistic is the checkpoint's."""
    checkpoint = tiny_checkpoint()
    model = network_like(checkpoint, checkpoint.metadata.class_names)
    begin_from(model, checkpoint, checkpoint.metadata.class_names)
    with torch.inference_mode():
        torch.testing.assert_close(model(batch_for(checkpoint)), model_from_checkpoint(checkpoint)(batch_for(checkpoint)))


def test_classes_are_taken_over_by_name() -> None:
    """A class has the answers that it had, wherever it stands now; one that is new has its own weights."""
    checkpoint = tiny_checkpoint()
    names = ("new", "class 2", "class 0", "newer")
    model = network_like(checkpoint, names)
    own = {name: value[[0, 3]].clone() for name, value in model.state_dict().items() if name.startswith("head.")}
    begin_from(model, checkpoint, names)
    with torch.inference_mode():
        before, after = model_from_checkpoint(checkpoint)(batch_for(checkpoint)), model(batch_for(checkpoint))
    torch.testing.assert_close(after[:, [1, 2]], before[:, [2, 0]])
    assert len(own) == 2
    assert all(torch.equal(model.state_dict()[name][[0, 3]], value) for name, value in own.items())


def test_a_network_of_other_classes_takes_all_but_its_last_layer() -> None:
    """Nothing of the head is taken where no class has the same name."""
    checkpoint = tiny_checkpoint()
    model = network_like(checkpoint, ("x", "y", "z"))
    head = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("head.")}
    begin_from(model, checkpoint, ("x", "y", "z"))
    trained = model_from_checkpoint(checkpoint).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, head.get(name, trained[name])), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stem_width": 16}, r"tiny is another network .*: its stem.0.weight is \(8, 3, 3, 3\), the recipe's \(16, 3, 3, 3\);"),
        ({"depths": (1, 1)}, r"its stages.1.1.conv1.weight is \(24, 24, 3, 3\), the recipe's absent; give an --initial"),
        ({"depths": (2, 2)}, r"its stages.0.1.conv1.weight is absent, the recipe's"),
    ],
)
def test_another_network_is_refused(config: dict[str, Any], message: str) -> None:
    """The message names a weight that differs, and what to do; the network keeps its weights."""
    checkpoint = tiny_checkpoint()
    other = build_model("resnet18", replace(checkpoint.metadata.config, **config))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(RunError, match=message):
        begin_from(other, checkpoint, checkpoint.metadata.class_names)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


# The run


@pytest.fixture
def short_recipe(monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny recipe over an epoch so gentle that the network stays what it was."""
    gentle = replace(TINY.optimizer, learning_rate=1e-6, muon_learning_rate=1e-6)
    monkeypatch.setitem(RECIPES, "short", replace(TINY, name="short", epochs=1, optimizer=gentle, sizes=()))
    return "short"


def run(recipe: str, data: Path, out: Path, *extra: str) -> int:
    return main(["train", "--recipe", recipe, "--data", str(data), "--out", str(out), "--device", "cpu", *extra])


def test_the_command_goes_on_with_a_checkpoint(
    short_recipe: str, data_folder: Path, finished_run: Path, tmp_path: Path
) -> None:
    """An epoch that moves nothing ends with the accuracy of the checkpoint it began from, and the card names that one."""
    initial = finished_run / CHECKPOINT_FILE
    assert run(short_recipe, data_folder, tmp_path, "--initial-checkpoint", str(initial)) == 0
    before, after = load_checkpoint(initial), load_checkpoint(tmp_path / CHECKPOINT_FILE)
    assert after.metadata.metrics["test_accuracy"] == before.metadata.metrics["test_accuracy"] > 0.9
    assert (
        f"Began with the weights of `tiny`, version `{before.version}` (recipe `tiny`)."
        in (tmp_path / "MODEL_CARD.md").read_text()
    )


def test_images_are_taken_as_the_checkpoint_takes_them(short_recipe: str, data_folder: Path, tmp_path: Path) -> None:
    """Size, normalisation and fit are the initial checkpoint's; another size can be asked for."""
    spec = InputSpec(size=24, mean=(0.4, 0.4, 0.4), std=(0.2, 0.3, 0.4), fit="squash")
    first = tmp_path / "first"
    train(replace(TINY, epochs=1), load_source(data_folder, spec), RunOptions(first, input=spec))
    initial = ("--initial-checkpoint", str(first / CHECKPOINT_FILE))
    assert run(short_recipe, data_folder, tmp_path / "same", *initial) == 0
    assert load_checkpoint(tmp_path / "same" / CHECKPOINT_FILE).metadata.input == spec
    assert run(short_recipe, data_folder, tmp_path / "larger", *initial, "--size", "40") == 0
    assert load_checkpoint(tmp_path / "larger" / CHECKPOINT_FILE).metadata.input == replace(spec, size=40)


def test_one_more_class_is_added_to_a_trained_network(
    short_recipe: str, data_folder: Path, finished_run: Path, tmp_path: Path
) -> None:
    """The classes that it knew are still told apart."""
    data = tmp_path / "data"
    shutil.copytree(data_folder, data)
    for part in ("train", "test"):
        shutil.copytree(write_classes(tmp_path / part, 10) / "bars", data / part / "another")
    out = tmp_path / "run"
    assert run(short_recipe, data, out, "--initial-checkpoint", str(finished_run / CHECKPOINT_FILE)) == 0
    metadata = load_checkpoint(out / CHECKPOINT_FILE).metadata
    assert metadata.class_names == ("another", "bars", "green", "red")
    assert metadata.metrics["test_per_class"]["red"] > 0.8


def test_a_run_that_began_with_a_checkpoint_continues_to_the_same_result(
    source: Source, finished_run: Path, tmp_path: Path
) -> None:
    """SIGINT changes nothing but the time; the same folder with another beginning is refused."""
    initial, recipe = load_checkpoint(finished_run / CHECKPOINT_FILE), replace(TINY, epochs=2)
    stopped = assert_continues(partial(train, recipe, source, initial_checkpoint=initial), tmp_path)
    with pytest.raises(RunError, match="another initial checkpoint; choose another --out"):
        train(recipe, source, stopped)


@pytest.mark.parametrize(
    ("file", "message"),
    [("absent", "there is no checkpoint at"), ("damaged", "damaged"), ("other", "is another network than the recipe's")],
)
def test_a_checkpoint_that_cannot_be_begun_from_is_named(
    file: str, message: str, short_recipe: str, data_folder: Path, checkpoint_path: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """No run folder is made then."""
    path = tmp_path / "initial.safetensors"
    if file == "other":
        path = checkpoint_path
    elif file == "damaged":
        path.write_bytes(checkpoint_path.read_bytes()[:-10])
    assert run(short_recipe, data_folder, tmp_path / "run", "--initial-checkpoint", str(path)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Torchvision's weights


@pytest.fixture
def torchvision_weights() -> dict[str, torch.Tensor]:
    """The state dict of ``torchvision.models.resnet18`` with random weights."""
    torch.manual_seed(2)
    state: dict[str, torch.Tensor] = torchvision.models.resnet18().state_dict()
    return state


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_run_begins_with_torchvisions_weights(
    name: str, short_recipe: str, torchvision_weights: dict[str, torch.Tensor], data_folder: Path, tmp_path: Path
) -> None:
    """From a state dict; an epoch that moves nothing leaves their direction."""
    save = save_file if name.endswith("safetensors") else torch.save
    save(torchvision_weights, tmp_path / name)
    initial = str(tmp_path / name)
    assert run(short_recipe, data_folder, tmp_path / "run", "--initial-checkpoint", initial, "--size", "32") == 0
    checkpoint = load_checkpoint(tmp_path / "run" / CHECKPOINT_FILE)
    metadata = checkpoint.metadata
    assert metadata.architecture == "resnet18-imagenet"
    assert metadata.input == replace(MODELS["resnet18-imagenet"].input, size=32)
    assert metadata.class_names == ("bars", "green", "red")
    before = torchvision_weights["layer3.1.conv2.weight"].numpy()
    after = checkpoint.weights["layer3.1.conv2.weight"].astype(np.float32)
    assert np.vdot(before, after) / (np.linalg.norm(before) * np.linalg.norm(after)) > 0.999  # Muon sets the length


def test_imagenet_takes_its_own_size_and_normalisation(torchvision_weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """224 pixels and the means of ImageNet, and an answer as torchvision's own network gives it, to the last bit."""
    torch.save(torchvision_weights, tmp_path / "weights.pth")
    checkpoint = load_initial(str(tmp_path / "weights.pth"))
    assert checkpoint.metadata.input == InputSpec(224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    theirs = torchvision.models.resnet18().eval()
    theirs.load_state_dict(torchvision_weights)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(model_from_checkpoint(checkpoint)(images), theirs(images))


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    """A file that would run code when it is loaded is refused, and its code does not run."""
    torch.save({"fc.weight": _Trap(tmp_path / "sprung")}, tmp_path / "weights.pth")
    with pytest.raises(RunError, match="cannot read weights from"):
        load_initial(str(tmp_path / "weights.pth"))
    assert not (tmp_path / "sprung").exists()


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_weights_of_another_network_are_refused(torchvision_weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A state dict of another network is named as such, and one with a weight too few by that weight."""
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(RunError, match=r"is no state dict of torchvision.models.resnet18"):
        load_initial(str(tmp_path / "other.pth"))
    del torchvision_weights["layer1.0.bn1.bias"]
    torch.save(torchvision_weights, tmp_path / "incomplete.pth")
    with pytest.raises(CheckpointError, match=r"missing layer1\.0\.bn1\.bias"):
        load_initial(str(tmp_path / "incomplete.pth"))


def test_weights_that_cannot_be_reached_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the message says which file to put where."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"download https://download.pytorch.org/models/resnet18-f37072fd.pth elsewhere"):
        load_initial("imagenet")
