"""A checkpoint as a folder that the Hugging Face Hub takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from service.model.atomic_file import replacing
from service.model.checkpoint import Checkpoint
from training.output.model_card import is_cifar10, model_card
from training.run.run_folder import write_text

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"


def write_hub_folder(checkpoint: Checkpoint, source: Path, folder: Path) -> None:
    """Lay out the checkpoint at ``source``: its file unchanged, ``config.json``, and ``README.md``, the model card.

    Raises WriteError when the folder cannot be written.
    """
    with replacing(folder / WEIGHTS_FILE) as file:
        file.write(source.read_bytes())
    write_text(folder / CONFIG_FILE, json.dumps(hub_config(checkpoint), indent=2) + "\n")
    write_text(folder / CARD_FILE, f"---\n{front_matter(checkpoint)}---\n\n{model_card(checkpoint)}")


def hub_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return ``config.json``: the labels as the Hub's widgets read them. The weights' own metadata has all else."""
    metadata = checkpoint.metadata
    labels = dict(enumerate(metadata.class_names))
    return {
        "architectures": [metadata.architecture],
        "model_type": metadata.architecture,
        "id2label": labels,
        "label2id": {name: index for index, name in labels.items()},
    }


def front_matter(checkpoint: Checkpoint) -> str:
    """Return the card's metadata; every value is JSON, which YAML contains."""
    metadata, metrics = checkpoint.metadata, checkpoint.metadata.metrics
    entries: dict[str, Any] = {
        "pipeline_tag": "image-classification",
        "library_name": "cifar10-prediction-service",
        "tags": ["image-classification", metadata.architecture],
        "metrics": ["accuracy"],
    }
    if is_cifar10(metadata):
        entries["datasets"] = ["uoft-cs/cifar10"]
    if "test_accuracy" in metrics:
        name, kind = ("CIFAR-10", "uoft-cs/cifar10") if is_cifar10(metadata) else ("own images", "imagefolder")
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": name, "type": kind, "split": "test"},
            "metrics": [{"type": "accuracy", "value": round(metrics["test_accuracy"], 6)}],
        }
        entries["model-index"] = [{"name": metadata.name, "results": [result]}]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items())
