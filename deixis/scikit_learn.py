"""A classifier with scikit-learn's interface, which needs no training: the service knows what words mean."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from deixis._client import Client
from deixis._images import ImageLike
from deixis._transport import DEFAULT_URL
from deixis.errors import ClientError


class ZeroShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies images among words, by a service of Deixis.

    It takes part where scikit-learn's classifiers do: in pipelines, ``cross_val_score``, ``classification_report``,
    votes of several. ``X`` is a sequence of images in any form that ``Client.classify`` takes, also as an array of
    paths, shape (images,), or of pixels, shape (images, height, width, channels), uint8.

    Args:
        labels: words to choose from; without them, and without ``label_set``, those that ``fit`` is shown.
        label_set: or the name of a stored label set, ``name`` or ``name@version``; its classes as of ``fit``.
        method: a method of ``Client.methods``; by default the service's.
        model: a model of ``Client.models``; by default the service's first.
        template: a template set, or one template with ``{}`` for the word.
        url: of the service.
        api_key: where it wants one; by default what DEIXIS_API_KEY holds.
        batch_size: images of a request.
        concurrency: requests at a time.

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
        """Look the labels up; nothing is trained, and the images are not looked at.

        Args:
            X: not used.
            y: the labels of images, which are those to choose from where none were given.

        Raises:
            ValueError: no labels at all, both kinds, fewer than two, or ``y`` has one that is not among them.
        """
        del X
        if self.labels is not None and self.label_set is not None:
            raise ValueError("give labels or label_set, not both")
        if self.labels is not None:
            if isinstance(self.labels, str):
                raise ValueError("labels must be a list of words; a text alone would be read letter by letter")
            classes = list(self.labels)
        elif self.label_set is not None:
            with self._client() as client:
                found = client.label_sets.get(self.label_set)
            # From now on that version, whatever the set becomes.
            self.label_set_ = f"{found.name}@{found.version}"
            classes = [each.name for each in found.classes]
        elif y is not None:
            classes = np.unique(np.asarray(y)).tolist()
        else:
            raise ValueError("there are no labels: give labels or label_set, or y to fit")
        if not all(isinstance(each, str) for each in classes):
            raise ValueError("labels must be words, which are what the service understands; numbers say nothing to it")
        if len(set(classes)) < 2:
            raise ValueError(f"there must be two labels or more to choose from, not {len(set(classes))}")
        self.classes_ = np.array(classes)
        if y is not None and (unknown := sorted(set(np.asarray(y).tolist()) - set(classes), key=str)):
            raise ValueError(f"y has labels that are not among those to choose from: {unknown[:5]}")
        return self

    def predict_proba(self, X: Sequence[ImageLike]) -> np.ndarray[Any, np.dtype[np.float64]]:  # noqa: N803
        """Return the probability of each label, float64, shape (images, classes); rows sum to 1 for softmax models.

        Raises:
            ClientError: the service refused, or an image cannot be read.
        """
        check_is_fitted(self)
        column = {label: place for place, label in enumerate(self.classes_.tolist())}
        found = np.zeros((len(X), len(column)))
        with self._client() as client:
            question: dict[str, Any] = {"top_k": len(column), **self._question()}
            images = list(X)
            for each in client.stream(images, batch_size=self.batch_size, concurrency=self.concurrency, **question):
                if each.result.error is not None:
                    told = each.result.error
                    raise ClientError(f"image {each.index}: {told.title}: {told.detail}")
                for prediction in each.result.predictions:
                    found[each.index, column[prediction.label]] = prediction.score
        return found

    def predict(self, X: Sequence[ImageLike]) -> np.ndarray[Any, Any]:  # noqa: N803
        """Return the best label of each image, shape (images,); raises as ``predict_proba``."""
        best = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def _question(self) -> dict[str, Any]:
        words = {"label_set": self.label_set_} if self.label_set is not None else {"labels": self.classes_.tolist()}
        return {**words, "method": self.method, "model": self.model, "template": self.template}

    def _client(self) -> Client:
        return Client(self.url, api_key=self.api_key)

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that images come in, and that nothing has to be fitted on them."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.target_tags.required = False
        tags.no_validation = True
        return tags
