"""The JSON that clients see, as pydantic models: the source of the OpenAPI document. Hot routes write it directly."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from service.answers import DEFAULT_TOP_K

# A PNG of one pixel, in base64.
EXAMPLE_IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"

FileName = Annotated[
    str | None, Field(description="what the client called the file; null where it has no name", examples=["tom.jpg"])
]


class Model(BaseModel, from_attributes=True):
    """Which model answered; ``version`` is the first 12 hex digits of the checkpoint's SHA-256."""

    name: str = Field(examples=["resnet18-cifar10"])
    version: str = Field(examples=["3f9a1c0b7e52"], pattern="^[0-9a-f]{12}$")


class ScoredLabel(BaseModel):
    """A class and its calibrated probability."""

    label: str = Field(examples=["cat"])
    score: float = Field(ge=0, le=1, examples=[0.9731])


class Answer(BaseModel):
    """The prediction for one image: the best class, and the ``top_k`` best in descending order."""

    label: str | None = Field(
        description="null for an image that is not known, where unknown=reject was asked for", examples=["cat"]
    )
    score: float | None = Field(ge=0, le=1, description="null where the label is", examples=[0.9731])
    predictions: list[ScoredLabel]
    known: bool | None = Field(
        None, description="whether the typicality is at least the threshold; absent for a model that has no typicality"
    )
    typicality: float | None = Field(
        None, ge=0, le=1, description="share of held-out training-set images that look less like the rest than this one"
    )
    filename: FileName
    model: Model


class Heatmap(BaseModel):
    """Where the network found what speaks for a class: rows of pixels as the network sees them, 1 where it is the most."""

    label: str = Field(examples=["cat"])
    heatmap: list[list[float]] = Field(examples=[[[0.0, 0.31], [0.62, 1.0]]], description="0 to 1, `size` rows of `size`")
    filename: FileName
    model: Model


class EntryError(BaseModel):
    """Why one file of a batch has no answer."""

    status: int = Field(examples=[422])
    code: str = Field(examples=["invalid_image"])
    detail: str = Field(examples=["the image is damaged or cut short; send the complete file"])


class FailedEntry(BaseModel):
    """One file of a batch that has no answer."""

    filename: str | None
    error: EntryError


class BatchAnswer(BaseModel):
    """One entry for each file, in the order sent; one bad file never fails its neighbours."""

    results: list[Answer | FailedEntry]


class PredictParameters(BaseModel):
    """Options of a JSON request. None declares a default, which generated clients would send beside the same in the query."""

    top_k: int | None = Field(
        None, ge=1, description=f"how many classes to give, best first; {DEFAULT_TOP_K} unless given, or all if there are fewer"
    )
    unknown: Literal["flag", "reject"] | None = Field(
        None, description="reject: the label and score of an image that is not known are null; flag unless given"
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="an image of a smaller typicality is not known; the model's own unless given"
    )


class PredictRequest(BaseModel):
    """One image as JSON."""

    inputs: str = Field(
        description="the image in base64; a data: URI is accepted, any other URL is refused", examples=[EXAMPLE_IMAGE]
    )
    parameters: PredictParameters | None = None


class HuggingFaceParameters(PredictParameters):
    """Options of a request in Hugging Face's dialect."""

    function_to_apply: Literal["softmax"] | None = None


class HuggingFaceRequest(PredictRequest):
    """One image as JSON, as Hugging Face's clients send it when there are parameters."""

    parameters: HuggingFaceParameters | None = None


class Problem(EntryError):
    """An error, as in RFC 9457; ``detail`` says what to do."""

    type: str = Field(examples=["urn:problem:invalid-image"])
    title: str = Field(examples=["Invalid image"])
    request_id: str = Field(examples=["5f0c1d2e3b4a59687786a5b4c3d2e1f0"])


class Labels(BaseModel):
    """The class names, in the order of the network's outputs."""

    labels: list[str] = Field(examples=[["cat", "dog"]])
    model: Model


class Sample(BaseModel):
    """An image that the model knows."""

    label: str = Field(examples=["cat"])
    image: str = Field(description="a PNG of the size of the network's input, in base64", examples=[EXAMPLE_IMAGE])


class Samples(BaseModel):
    """The known images of the model's checkpoint; none where it has none."""

    samples: list[Sample]
    model: Model


class Health(BaseModel):
    """What orchestrators ask for; 200 only when a prediction would be answered."""

    status: Literal["ready", "starting", "draining", "failed"]
    version: str = Field("", examples=["0.1.0"], description="of the service")
    model: Model | None
    device: str = Field(examples=["cpu"])
    runtime: str = Field(examples=["openvino-int8"])
    queue_depth: int = Field(ge=0, description="images that wait for the device")
    uptime_s: float = Field(ge=0)
    detail: str | None = Field(None, description="what is not as it should be, such as a refused checkpoint; absent if nothing")
