"""A zero-shot image classifier with the interface of scikit-learn."""

from collections.abc import Sequence
from typing import Any, Self

from deixis._client import Client
from deixis._images import ImageLike
from deixis._transport import DEFAULT_URL
from deixis.errors import ClientError
from deixis.extras import needs_extra

try:
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError(needs_extra("ZeroShotClassifier", "scikit-learn")) from error


class ZeroShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies images by means of a Deixis service.

    It can be used like other classifiers of scikit-learn: in pipelines, ``cross_val_score``,
    ``classification_report`` and voting ensembles. ``X`` is a sequence of images in any form that ``Client.classify``
    accepts, or an array of paths, shape (images,), or of pixels, shape (images, height, width, channels), uint8.

    Args:
        labels: the labels; without ``labels`` and ``label_set``, they are the classes in ``y`` of ``fit``.
        label_set: a stored label set, ``name`` or ``name@version``; ``fit`` fixes the version. Images have one label,
            also if the label set allows several.
        method: a method of ``Client.methods``; by default the service's.
        model: a model of ``Client.models``; by default the service's first.
        template: a template set, or one template with ``{}`` for the label.
        url: address of the service.
        api_key: API key, if the service requires one; by default the environment variable DEIXIS_API_KEY.
        batch_size: images per request.
        concurrency: maximum number of simultaneous requests.

    Attributes:
        classes_: the labels, shape (classes,), in the order of the columns of ``predict_proba``.
    """

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        method: str | None = None,
        model: str | None = None,
        template: str | None = None,
        url: str = DEFAULT_URL,
        api_key: str | None = None,
        batch_size: int = 8,
        concurrency: int = 4,
    ) -> None:
        self.labels = labels
        self.label_set = label_set
        self.method = method
        self.model = model
        self.template = template
        self.url = url
        self.api_key = api_key
        self.batch_size = batch_size
        self.concurrency = concurrency

    def fit(self, X: Any = None, y: Any = None) -> Self:  # noqa: N803 - scikit-learn's name
        """Look up the labels. Nothing is trained.

        Args:
            X: ignored.
            y: labels of images; they become the classes if neither ``labels`` nor ``label_set`` is set.

        Raises:
            ValueError: no labels, both ``labels`` and ``label_set``, fewer than two labels, or an unknown label in
                ``y``.
        """
        del X
        if self.labels is not None and self.label_set is not None:
            raise ValueError("labels and label_set exclude each other; set one of them")
        if self.labels is not None:
            if isinstance(self.labels, str):
                raise ValueError("labels must be a list of strings, not one string")
            classes = list(self.labels)
        elif self.label_set is not None:
            with self._client() as client:
                label_set = client.label_sets.get(self.label_set)
            # Fixed, so that later changes of the label set do not change the columns of predict_proba.
            self.label_set_ = f"{label_set.name}@{label_set.version}"
            classes = [entry.name for entry in label_set.classes]
        elif y is not None:
            classes = np.unique(np.asarray(y)).tolist()
        else:
            raise ValueError("there are no labels; set labels or label_set, or pass y to fit")
        if not all(isinstance(label, str) for label in classes):
            raise ValueError("labels must be strings, because the service classifies by their meaning")
        if len(set(classes)) < 2:
            raise ValueError(f"there must be two or more different labels, not {len(set(classes))}")
        self.classes_ = np.array(classes)
        if y is not None and (unknown := sorted(set(np.asarray(y).tolist()) - set(classes), key=str)):
            raise ValueError(f"y has labels that are not among the classes: {unknown[:5]}")
        return self

    def predict_proba(self, X: Sequence[ImageLike]) -> np.ndarray[Any, np.dtype[np.float64]]:  # noqa: N803
        """Return the probability of each label, float64, shape (images, classes); rows sum to 1 for softmax models.

        Raises:
            ClientError: the service refused a request, or an image cannot be read.
        """
        check_is_fitted(self)
        column_of = {label: column for column, label in enumerate(self.classes_.tolist())}
        scores = np.zeros((len(X), len(column_of)))
        request = self._request(top_k=len(column_of))
        with self._client() as client:
            for row in client.stream(list(X), batch_size=self.batch_size, concurrency=self.concurrency, **request):
                if (error := row.result.error) is not None:
                    raise ClientError(f"image {row.index}: {error.title}: {error.detail}")
                for prediction in row.result.predictions:
                    scores[row.index, column_of[prediction.label]] = prediction.score
        return scores

    def predict(self, X: Sequence[ImageLike]) -> np.ndarray[Any, Any]:  # noqa: N803
        """Return the best label of each image, shape (images,). Raises the errors of ``predict_proba``."""
        best = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def _request(self, *, top_k: int) -> dict[str, Any]:
        labels = {"label_set": self.label_set_} if self.label_set is not None else {"labels": self.classes_.tolist()}
        fields = {"method": self.method, "model": self.model, "template": self.template, "top_k": top_k}
        # A class per image, also where the label set allows several.
        return {**labels, **fields, "multi_label": False}

    def _client(self) -> Client:
        return Client(self.url, api_key=self.api_key)

    def __sklearn_tags__(self) -> Any:
        """Declare that the input is images and that ``y`` is optional."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.target_tags.required = False
        tags.no_validation = True
        return tags
