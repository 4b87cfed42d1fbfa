"""The model card: what a checkpoint is, what it reached, how it was trained, what it is not fit for.

Every figure in it was measured and stands in the checkpoint's metadata; one that was not is left out.
Source of the form: Mitchell et al., "Model Cards for Model Reporting" (2019).
"""

from __future__ import annotations

import json
import math

from service.model.checkpoint import Checkpoint, CheckpointMetadata

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_FIGURES = (
    ("accuracy (top 1), one view", "test_accuracy"),
    ("balanced accuracy: the mean over classes", "test_balanced_accuracy"),
    ("accuracy (top 5)", "test_top5_accuracy"),
    ("accuracy, the image and its mirror image averaged", "test_accuracy_tta"),
    ("accuracy of the int8 graph that a CPU serves", "test_accuracy_int8"),
    ("calibration error (15 bins) of the plain logits", "test_ece_before"),
    ("calibration error (15 bins)", "test_ece"),
)


def is_cifar10(metadata: CheckpointMetadata) -> bool:
    """Whether the classes are those of CIFAR-10, and the test set, where there was one, is as large as its own."""
    return metadata.class_names == CIFAR10_CLASSES and metadata.metrics.get("test_images", 10_000) == 10_000


def model_card(checkpoint: Checkpoint) -> str:
    """Return the card in Markdown."""
    metadata = checkpoint.metadata
    parts = [_what_it_is(checkpoint), _figures(metadata), _training(metadata), _limits(metadata), _use(metadata)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_it_is(checkpoint: Checkpoint) -> str:
    metadata = checkpoint.metadata
    # Running means and variances are state, not parameters.
    parameters = sum(
        math.prod(value.shape)
        for name, value in checkpoint.weights.items()
        if not name.endswith(("running_mean", "running_var"))
    )
    data = "CIFAR-10" if is_cifar10(metadata) else "a folder of images"
    return f"""# {metadata.name}

An image classifier with {len(metadata.class_names)} classes ({", ".join(metadata.class_names)}), trained on {data}.

- Version `{checkpoint.version}` (the start of the file's SHA-256), made {metadata.created} by code revision \
`{metadata.code_revision}`.
- Architecture `{metadata.architecture}`, {parameters:,} parameters, stored in half precision.
- Takes RGB images of {metadata.input.size} x {metadata.input.size} pixels; others are scaled to that \
({"the centred square" if metadata.input.fit == "crop" else "each side apart"}).
- Returns probabilities, {_calibration(metadata)}."""


def _calibration(metadata: CheckpointMetadata) -> str:
    calibration = metadata.calibration
    if not calibration.cubic:
        return f"calibrated with temperature {calibration.temperature:.3f}"
    return (
        f"calibrated by softmax(x / {calibration.temperature:.3f} + {calibration.cubic:.4f} x³), where x is an image's logits"
        " less the largest"
    )


def _figures(metadata: CheckpointMetadata) -> str:
    metrics = metadata.metrics
    rows = [(title, metrics[key]) for title, key in _FIGURES if key in metrics]
    if not rows:
        return ""
    lines = ["## Figures", ""]
    if "test_images" in metrics:
        note = f" ({metrics['data_note']})" if metrics.get("data_note") else ""
        which = "CIFAR-10's test set" if is_cifar10(metadata) else "the test set"
        lines += [f"On the {metrics['test_images']:,} images of {which}{note}, used for neither training nor calibration:", ""]
    lines += ["| figure | value |", "| --- | ---: |", *(f"| {title} | {value * 100:.2f} % |" for title, value in rows)]
    per_class: dict[str, float] = metrics.get("test_per_class", {})
    if per_class:
        lines += ["", "| class | accuracy |", "| --- | ---: |"]
        lines += [f"| {name} | {value * 100:.2f} % |" for name, value in per_class.items()]
    unknown: dict[str, dict[str, float]] = metrics.get("unknown", {})
    if unknown:
        flagged = next(iter(unknown.values()))["data_flagged"]
        lines += [
            "",
            "Typicality is the share of held-out images that are less typical of the training set. Of the test set"
            f" {flagged * 100:.1f} % are below the threshold of {metadata.unknown_threshold:g}."
            " How well it separates other images:",
            "",
            "| images | area under ROC | not below the threshold |",
            "| --- | ---: | ---: |",
        ]
        lines += [f"| {name} | {row['auroc']:.3f} | {(1 - row['flagged']) * 100:.0f} % |" for name, row in unknown.items()]
    return "\n".join(lines)


def _training(metadata: CheckpointMetadata) -> str:
    recipe, metrics = metadata.recipe, metadata.metrics
    if not recipe:
        return ""
    lines = ["## Training", ""]
    done = metrics.get("epochs_done", recipe["epochs"])
    lines.append(f"- Recipe `{recipe['name']}`, seed {recipe.get('seed', 'unknown')}, {done} of {recipe['epochs']} epochs.")
    if "train_images" in metrics:
        lines.append(
            f"- {metrics['train_images']:,} training images; {metrics['val_images']:,} others were held out for all choices"
            " and for the calibration."
        )
    if "train_accuracy" in metrics:
        lines.append(
            f"- In the epoch of these weights {metrics['train_accuracy'] * 100:.2f} % of the training images were right,"
            f" as augmented, and {metrics['val_accuracy'] * 100:.2f} % of the validation images."
        )
    if "elapsed_s" in metrics:
        device = f" on {metrics['train_device']}" if "train_device" in metrics else ""
        lines.append(f"- {metrics['elapsed_s'] / 60:.1f} minutes{device}.")
    if began := recipe.get("initial_checkpoint"):
        lines.append(
            f"- Began with the weights of `{began['name']}`, version `{began['version']}` (recipe `{began['recipe']}`)."
        )
    lines += [f"- `{name}`: `{json.dumps(value)}`" for name, value in recipe.items() if value]  # what is on
    return "\n".join(lines)


def _limits(metadata: CheckpointMetadata) -> str:
    size = metadata.input.size
    lines = [
        "## Not fit for",
        "",
        f"- Images of none of its {len(metadata.class_names)} classes: each gets one of them. A low typicality reveals many"
        " such images, not all; the score does not.",
        f"- Fine details: the network sees {size} x {size} pixels, whatever was sent, and one class per image.",
        "- Images unlike its training data (other cameras, drawings, crops, corruption): the accuracy and the calibration above"
        " hold for images drawn as the test set was.",
        "- Decisions about people, safety or money.",
    ]
    if is_cifar10(metadata):
        lines.append(
            "- Commercial use without a check of the rights: the images of CIFAR-10 were collected from the web for research"
            ' (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).'
        )
    return "\n".join(lines)


def _use(metadata: CheckpointMetadata) -> str:
    return f"""## Use

`SERVICE_CHECKPOINT=model.safetensors python -m service` serves it; `service.model.checkpoint.load_checkpoint` and \
`service.model.network.model_from_checkpoint` rebuild the network, which takes `(pixel / 255 - mean) / std` with mean \
{list(metadata.input.mean)} and standard deviation {list(metadata.input.std)}."""
