"""Zero-shot: the class whose prompt embedding is nearest to the image.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, section 3.1.
"""

from typing import ClassVar, Self

from app.task import ClassEmbeddings, ImageFeatures, Logits


class ZeroShot:
    """Cosines times the encoder's own scale, plus its bias if it has one."""

    name: ClassVar[str] = "zero-shot"
    summary: ClassVar[str] = (
        "Cosine between the image and the mean of each class's prompts, times the model's scale"
        " (Radford et al., ICML 2021)."
    )
    transductive: ClassVar[bool] = False

    def fit(self, class_embeddings: ClassEmbeddings, *, logit_scale: float, logit_bias: float | None) -> Self:
        """Keep the class embeddings, which are the classifier."""
        self.class_embeddings_ = class_embeddings
        self.logit_scale_ = logit_scale
        self.logit_bias_ = logit_bias or 0.0
        return self

    def predict_logits(self, image_features: ImageFeatures) -> Logits:
        """Return ``logit_scale * cosine + logit_bias``."""
        logits: Logits = self.logit_scale_ * (image_features @ self.class_embeddings_.T) + self.logit_bias_
        return logits
