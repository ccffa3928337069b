"""The models in service and the methods."""

from typing import Literal

from pydantic import Field

from app.api.schemas._base import Response


class ImagePathBody(Response):
    """How a model's image tower runs on this machine."""

    backend: str = Field(description="`torch` or `openvino`.")
    device: str
    precision: str = Field(description="`fp32`, `fp16`, `bf16` or `int8`.")
    threads: int = Field(description="CPU threads for the computation; 0 on other devices.")
    image_batch: int = Field(description="Maximum number of images in one forward pass.")
    images_per_s: float | None = Field(
        description="Throughput measured when the model was first loaded on this machine; null if not measured."
    )


class ModelBody(Response):
    """A model in service."""

    name: str
    default: bool
    embed_dim: int
    image_size_px: int
    logit_scale: float
    logit_bias: float | None
    queued_images: int = Field(description="Images in its queue, including those being encoded.")
    image_path: ImagePathBody
    probability: str = Field(description="The function that converts logits to scores: `softmax` or `sigmoid`.")


class ModelEntry(Response):
    """A model in service, as OpenAI's API describes it."""

    id: str = Field(description="The name of the model.")
    object: Literal["model"] = "model"
    created: int = Field(0, description="Always zero; clients of OpenAI's API expect this field.")
    owned_by: str = "deixis"


class ImageInputBody(Response):
    """The images that a request to classify may contain."""

    max_per_request: int = Field(description="Maximum number of images in a request.")
    max_bytes: int = Field(description="Maximum size of an image file.")
    urls: bool = Field(description="True if JSON requests may name images by URL (`DEIXIS_ALLOW_IMAGE_URLS`).")


class ModelList(Response):
    """The models in service, the default first; twice, since clients of OpenAI's API read ``object`` and ``data``."""

    object: Literal["list"] = "list"
    data: list[ModelEntry] = Field(description="The names of `models`, for clients of OpenAI's API.")
    models: list[ModelBody]
    images: ImageInputBody


class OptionBody(Response):
    """A numeric option of a method."""

    default: float
    minimum: float
    maximum: float
    description: str


class MethodBody(Response):
    """A classification method."""

    name: str
    summary: str
    transductive: bool = Field(
        description="True if the result of an image always depends on the other images of the request."
    )
    learns_from: list[str] = Field(
        description="The example images that it needs: `labelled images` or `unlabelled images`."
    )
    stateful: bool = Field(description="True if a result depends on the images of earlier requests.")
    default: bool
    uses_descriptions: bool = Field(description="True if class descriptions change its results.")
    control: bool = Field(description="True if it is a control for comparisons, not meant for use.")
    vocabulary_free: bool = Field(
        description="True if it discovers labels in captions instead of taking them from the request."
    )
    options: dict[str, OptionBody]


class MethodList(Response):
    """All methods."""

    methods: list[MethodBody]
