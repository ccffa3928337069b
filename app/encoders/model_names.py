"""The names of models, as settings, commands and requests write them."""

from collections.abc import Mapping
from types import MappingProxyType

from app.errors import ModelUnavailableError, did_you_mean

HUB_IDS: Mapping[str, str] = MappingProxyType(
    {
        "apple/DFN2B-CLIP-ViT-L-14-39B": "ViT-L-14/dfn2b_s39b",
        "apple/DFN5B-CLIP-ViT-H-14-378": "ViT-H-14-378-quickgelu/dfn5b",
        "apple/MobileCLIP2-S0": "MobileCLIP2-S0/dfndr2b",
        "apple/MobileCLIP2-S2": "MobileCLIP2-S2/dfndr2b",
        "facebook/PE-Core-B16-224": "PE-Core-B-16/meta",
        "facebook/PE-Core-L14-336": "PE-Core-L-14-336/meta",
        "google/siglip-base-patch16-256-multilingual": "ViT-B-16-SigLIP-i18n-256/webli",
        "google/siglip2-base-patch16-224": "ViT-B-16-SigLIP2/webli",
        "google/siglip2-base-patch16-256": "ViT-B-16-SigLIP2-256/webli",
        "google/siglip2-so400m-patch16-384": "ViT-SO400M-16-SigLIP2-384/webli",
        "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K": "ViT-B-16/datacomp_xl_s13b_b90k",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "ViT-B-32/laion2b_s34b_b79k",
        "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K": "ViT-L-14/datacomp_xl_s13b_b90k",
        "openai/clip-vit-base-patch16": "ViT-B-16-quickgelu/openai",
        "openai/clip-vit-base-patch32": "ViT-B-32-quickgelu/openai",
        "openai/clip-vit-large-patch14": "ViT-L-14-quickgelu/openai",
        "openai/clip-vit-large-patch14-336": "ViT-L-14-336-quickgelu/openai",
        "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k": "EVA02-L-14-336/merged2b_s6b_b61k",
    }
)
"""The names of models of the catalogue by the id with which the Hugging Face hub knows the same weights."""


def catalogue_name(name: str) -> str:
    """Return the name in the catalogue of a model that is given by its hub id; any other name stays as it is."""
    return HUB_IDS.get(name, name)


def model_source(spec: str) -> tuple[str, str, str]:
    """Split a model's name into source, location and tag.

    The sources are ``open_clip`` (``architecture/tag``), ``hf-hub`` (``hf-hub:org/repo``), ``local-dir``
    (``local-dir:path``) and ``embedded``; only the first has a tag.

    Raises:
        ModelUnavailableError: the name has another form.
    """
    if spec == "embedded":
        return "embedded", "", ""
    scheme, colon, rest = spec.partition(":")
    if colon and scheme in {"hf-hub", "local-dir"} and rest:
        return scheme, rest, ""
    architecture, slash, tag = spec.partition("/")
    if slash and architecture and tag and not colon:
        return "open_clip", architecture, tag
    raise ModelUnavailableError(
        f"'{spec}' is not a model name; write embedded, architecture/tag (ViT-B-32/laion2b_s34b_b79k), hf-hub:org/repo"
        f" or local-dir:path{did_you_mean(spec, ('embedded', *HUB_IDS.values()))}"
    )
