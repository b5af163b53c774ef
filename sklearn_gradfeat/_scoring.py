"""Scores by ``scoring``, and which metadata go to the scorer and to the splitter."""

from __future__ import annotations

from typing import Any

from sklearn.metrics import check_scoring, get_scorer
from sklearn.utils.metadata_routing import (
    MetadataRouter,
    MethodMapping,
    _raise_for_params,
    _routing_enabled,
    process_routing,
)


class ScoringMixin:
    """A mixin for estimators with parameters ``cv`` and ``scoring``.

    A class has the name of the scorer that ``scoring=None`` stands for.
    """

    _default_scoring: str
    cv: Any
    scoring: Any

    def _get_scorer(self) -> Any:
        """Return the scorer; that of the estimator itself takes the weights of the samples."""
        if self.scoring is not None:
            return check_scoring(self, scoring=self.scoring)
        scorer = get_scorer(self._default_scoring)
        return scorer.set_score_request(sample_weight=True) if _routing_enabled() else scorer

    def _routed(
        self, sample_weight: Any, params: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what goes to the splitter and to the scorer."""
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        if not _routing_enabled():
            return params, weights
        routed = process_routing(self, "fit", **weights, **params)
        return routed["splitter"]["split"], routed["scorer"]["score"]

    def score(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> float:
        """Return the score of the predictions, by ``scoring``.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Samples of the shape that the estimator was fitted on.
        y : array-like
            Their targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples.
        **params : dict
            Routed to the scorer, where metadata routing is enabled.

        Returns
        -------
        float
        """
        _raise_for_params(params, self, "score")
        given = params if sample_weight is None else {**params, "sample_weight": sample_weight}
        if _routing_enabled():
            given = process_routing(self, "score", **given)["scorer"]["score"]
        return float(self._get_scorer()(self, X, y, **given))

    def get_metadata_routing(self) -> Any:
        """Return what is routed where: groups to the splitter, weights to fit and scorer.

        Returns
        -------
        MetadataRouter
        """
        to_split = MethodMapping().add(caller="fit", callee="split")
        to_score = MethodMapping().add(caller="fit", callee="score")
        to_score.add(caller="score", callee="score")
        router = MetadataRouter(owner=self).add_self_request(self)
        router.add(splitter=self.cv, method_mapping=to_split)
        return router.add(scorer=self._get_scorer(), method_mapping=to_score)
