"""The models in service and the methods."""

from pydantic import Field

from app.api.schemas._base import Response


class ImagePathBody(Response):
    """How a model's image tower is run on this machine."""

    backend: str = Field(description="`torch` or `openvino`.")
    device: str
    precision: str = Field(description="`fp32`, `fp16` or `bf16`.")
    threads: int = Field(description="For the arithmetic on a CPU, 0 elsewhere.")
    image_batch: int = Field(description="Most images in one forward pass.")
    images_per_s: float | None = Field(description="As measured when the model was first loaded here; null if not.")


class ModelBody(Response):
    """A model that is being served."""

    name: str
    default: bool
    embed_dim: int
    image_size_px: int
    logit_scale: float
    logit_bias: float | None
    queued_images: int = Field(description="Images admitted to its queue and not done yet.")
    image_path: ImagePathBody
    probability: str = Field(description="`softmax` or `sigmoid`: what makes a score of logits.")


class ModelList(Response):
    """The models served, the default first."""

    models: list[ModelBody]


class OptionBody(Response):
    """A number that a method takes."""

    default: float
    minimum: float
    maximum: float
    description: str


class MethodBody(Response):
    """A method that callers may name."""

    name: str
    summary: str
    transductive: bool = Field(description="Whether an image's answer always depends on other images.")
    learns_from: list[str] = Field(
        description="The example images that it needs: `labelled images` or `unlabelled images`."
    )
    stateful: bool = Field(description="Whether an answer depends on the images that were asked about before.")
    default: bool
    uses_descriptions: bool = Field(description="Whether descriptions of the classes change its answers.")
    control: bool = Field(description="Whether it is there to be compared with, and not for use.")
    vocabulary_free: bool = Field(description="Whether it is given no labels, and finds names in captions.")
    options: dict[str, OptionBody]


class MethodList(Response):
    """Every method."""

    methods: list[MethodBody]
