"""Fits of several processes, each with some of the samples, against fits of one process."""

import os
import pickle
import threading
import time
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.base import clone
from sklearn.model_selection import KFold

from sklearn_gradfeat import (
    GradientFeatureClassifierCV,
    GradientFeatureRegressorCV,
    config_context,
)
from sklearn_gradfeat.curvature import _kfac
from sklearn_gradfeat.data import (
    fit_together,
    gather_over_ranks,
    n_ranks,
    of_first_rank,
    on_all_ranks,
    rows_of_all_ranks,
    sum_over_ranks,
)
from sklearn_gradfeat.io import _checkpoint
from sklearn_gradfeat.io._archive import write_archive
from sklearn_gradfeat.linearized import LinearizedHead
from tests import ranks
from tests.tiny import X, Y, data, estimator, tiny_net
from tests.training.test_progress import Recorder

FAST = [
    "weights",
    "explicit rows",
    "two linearizations",
    "coarse space",
    "auto, coarse space",
    "auto, activation",
    "auto, gradient term",
    "auto, gradient term, two linearizations",
    "merged",
    "warm start",
]
# The linear models of several linearisations are solved loosely. The choice of penalties is that
# of models of held-out samples, which are solved to a tolerance of 1e-3.
OBJECTIVE = {"two linearizations": 1e-5}
# Two penalties are as good as each other on the held-out samples, so that rounding decides.
TIES = {"all auto, coarse space"}
# One process has no closed form, and all samples are in the preconditioner: the steps are the same.
SAME_STEPS = {
    "auto, gradient term",
    "auto, gradient term, coarse space",
    "auto, gradient term, two linearizations",
    "all auto, gradient term, coarse space",
    "merged",
    "warm start",
}


def error_of(function):
    """Return the type and the message of the error that a function raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


# --- what every rank of one process group does ------------------------------------------------


def sums(rank):
    with fit_together():
        return {
            "n": n_ranks(),
            "sum": sum_over_ranks(torch.full((3,), rank + 1.0)),
            "number": sum_over_ranks(torch.tensor(2**40 + rank)),
            "array": sum_over_ranks(np.array([0.5, rank])),
            "gather": gather_over_ranks("x" * rank),
            "rows": rows_of_all_ranks(torch.arange(2 * (rank + 1)).view(-1, 2)),
            "first": of_first_rank(torch.arange(2.0 + rank) + rank),
            "all": [on_all_ranks(True), on_all_ranks(rank == 0)],
        }


def outside(rank):
    """Outside of a fit nothing is communicated: the other rank is not there."""
    return sum_over_ranks(torch.tensor(1.0)) if rank == 0 else None


def predict_alone(rank, model):
    return model.predict(X) if rank == 0 else None


def fit_half(rank, model, **changes):
    rows = slice(rank, None, 2)
    data = {"X": X[rows], "y": Y[rows], **changes}
    return error_of(lambda: model.fit(**data))


def search(rank=0, checkpoint=None):
    """Return the results of a search, pickled, and the folds that this process has scored."""
    with mock.patch.object(
        GradientFeatureClassifierCV,
        "_score_fold",
        autospec=True,
        side_effect=GradientFeatureClassifierCV._score_fold,
    ) as score_fold:
        model = GradientFeatureClassifierCV(
            tiny_net(), activation_layer=["1", "3"], alphas=2, gradient_alphas=[1.0], cv=3,
            tol=1e-2, random_state=rank, checkpoint=checkpoint,
        ).fit(X, Y)  # fmt: skip
    folds = {call.args[1][0] for call in score_fold.call_args_list}
    names = ("scores_", "alphas_", "alpha_", "gradient_alpha_", "coef_", "gradient_coef_")
    return [pickle.dumps(getattr(model, name)) for name in names], folds


def resumed_search(rank, path):
    """Rank 1 is killed in its fold, while rank 0 has scored both of its own."""
    written = []

    def write(*arguments):
        write_archive(*arguments)
        written.append(arguments)
        if rank and len(written) == 4:
            raise KeyError("killed")

    with config_context(checkpoint_seconds=0):
        with mock.patch.object(_checkpoint, "write_archive", write):
            killed = error_of(lambda: search(rank, path / "search"))
        files = sorted(file.name for file in path.glob("search*"))
        return killed, files, search(rank, path / "search")[0], len(written)


def search_random_network(rank):
    """Rank 0 draws the network; leave-one-out is one task."""
    model = GradientFeatureRegressorCV(
        alphas=[1.0], gradient_alphas=[1.0], cv="loo", random_state=rank
    )
    return pickle.dumps(model.fit(X[:, 0, 0], Y).coef_)


def search_with(rank, shuffle=False, scoring=None, **changes):
    cv = KFold(2, shuffle=shuffle)
    model = GradientFeatureClassifierCV(
        tiny_net(), alphas=[1.0], gradient_alphas=[1.0], cv=cv, scoring=scoring
    )
    return error_of(lambda: model.fit(**{"X": X, "y": Y, **changes}))


def fit_in_thread():
    found = []
    with fit_together():
        thread = threading.Thread(
            target=lambda: found.append(error_of(lambda: estimator().fit(X, Y)))
        )
        thread.start()
        thread.join()
    return found[0]


def with_nan(rank):
    inputs = X[rank::2].copy()
    inputs[0] = np.nan if rank else 0
    return fit_half(rank, estimator(), X=inputs)


def with_another_network(rank):
    net = tiny_net()
    with torch.no_grad():
        net[0].bias += rank
    return fit_half(rank, estimator(net))


def with_another_model(rank, method):
    model = estimator(warm_start=True)
    assert fit_half(rank, model) is None
    model.coef_ = model.coef_ + rank
    return error_of(lambda: getattr(model, method)(X[rank::2], Y[rank::2]))


def without_memory(rank):
    """Memory runs out on rank 1, in passes of the solver and of the preconditioner."""

    def cramped(function, batch_of):
        def limited(*arguments, **options):
            if rank == 1 and len(arguments[batch_of][0]) > 4:
                raise torch.OutOfMemoryError("out of memory")
            return function(*arguments, **options)

        return limited

    vjp = cramped(LinearizedHead.vjp, 1)
    record = cramped(_kfac.record, 1)
    with mock.patch.object(LinearizedHead, "vjp", vjp), mock.patch.object(_kfac, "record", record):
        model = estimator()
        return fit_half(rank, model), model.predict_proba(X)


def resumed(rank, path):
    """Both ranks stop after a checkpoint of rank 0, the only one that has the file."""
    given = {"precision": "float64", "n_linearizations": 2, "tol": 1e-6}
    whole = estimator(**given)
    found = {"whole": fit_half(rank, whole)}
    model = estimator(**given, checkpoint=path / ("missing" if rank else "") / "checkpoint")
    written = []

    def write(*arguments):
        write_archive(*arguments)
        written.append(arguments)
        if len(written) == 8:
            raise KeyError("killed")

    with config_context(checkpoint_seconds=0):
        with mock.patch.object(_checkpoint, "write_archive", write):
            found["killed"] = fit_half(rank, model)
        found["n_written"] = len(written)
        found["other"] = fit_half(rank, clone(model).set_params(alpha=0.2))
        found["X of rank 1"] = fit_half(rank, model, X=X[rank::2] + rank)
        found["y of rank 1"] = fit_half(rank, model, y=(Y[rank::2] + rank) % 3)
        found["finished"] = fit_half(rank, model)
        found["some"] = fit_half(rank, clone(model).set_params(checkpoint=None if rank else "c"))
    found["same"] = np.allclose(model.coef_, whole.coef_, rtol=1e-8, atol=1e-10)
    return found | {"bits": model.coef_.tobytes()}


def bytes_of_collectives(rank, n):
    """Return the sizes of the tensors that a rank hands to torch in a fit of 2 n samples."""
    sizes = []

    def noted(function, given):
        def note(*arguments, **options):
            sizes.append(arguments[given].nbytes)
            return function(*arguments, **options)

        return note

    X, y = data(2 * n)
    model = estimator(
        activation_layer=None, tol=0, max_iter=3
    )  # the same passes for any number of samples
    with (
        warnings.catch_warnings(),
        mock.patch.object(dist, "all_reduce", noted(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", noted(dist.all_gather, 1)),
        mock.patch.object(dist, "broadcast", noted(dist.broadcast, 0)),
    ):
        warnings.simplefilter("ignore")
        model.fit(X[rank::2], y[rank::2])
    return sizes


def stopped_by_a_callback(rank):
    """Return the error and the iterations of a fit that a callback of rank 1 stops."""
    model = estimator(tol=1e-8)
    if not hasattr(model, "set_callbacks"):
        return None, 2
    model.set_callbacks(Recorder(stop_after=2 if rank == 1 else None))
    return fit_half(rank, model), model.n_iter_


def different_sums(rank):
    def fit():
        with fit_together():
            sum_over_ranks(torch.ones(2 + rank))

    return error_of(fit)


def killed(rank):
    def transform(batch):
        if rank == 1:
            os._exit(1)
        return batch

    start = time.monotonic()
    return fit_half(rank, estimator(preprocess=transform)), time.monotonic() - start


def everything(rank, size, path):
    model = estimator()
    found = {name: ranks.fit_case(name, rank, size) for name in FAST}
    found |= {
        "sums": sums(rank),
        "outside": outside(rank),
        "raises": with_nan(rank),
        "alpha": fit_half(rank, estimator(alpha=0.1 * (rank + 1))),
        "store_dtype": fit_half(rank, estimator(store_dtype="bfloat16" if rank else "auto")),
        "invalid": fit_half(rank, estimator(alpha=-1.0 if rank else 1.0)),
        "shape": fit_half(rank, estimator(), X=X[rank::2, :, : 8 - rank]),
        "network": with_another_network(rank),
        "merge": with_another_model(rank, "merge"),
        "warm start, model": with_another_model(rank, "fit"),
        "classes": fit_half(rank, estimator(), y=Y[rank::2] if rank else Y[rank::2].astype(str)),
        "search": search(rank),
        "resumed search": resumed_search(rank, path),
        "random network": search_random_network(rank),
        "search, half": fit_half(rank, GradientFeatureClassifierCV()),
        "search, X": search_with(rank, X=X + rank),
        "search, cv": search_with(rank, shuffle=True),
        "search, scorer": search_with(rank, scoring=lambda *_: 1 / (1 - rank)),
        "thread": fit_in_thread(),
        "memory": without_memory(rank),
        "checkpoint": resumed(rank, path),
        "bytes": [bytes_of_collectives(rank, n) for n in (300, 1200)],
        "different": different_sums(rank),
        "stopped": stopped_by_a_callback(rank),
        "afterwards": fit_half(rank, model),
        "probabilities": model.predict_proba(X),
        "alone": predict_alone(rank, model),
    }
    if rank == 1:
        ranks.write(path, rank, found)
    found["killed"] = killed(rank)
    return found


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    return ranks.run(2, path, everything, path)


# --- what they found --------------------------------------------------------------------------


def check_against_one_process(name, of_ranks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = ranks.fit_case(name)
    for found in of_ranks:
        assert found["bits"] == of_ranks[0]["bits"]
    found = of_ranks[0]
    assert found["n_linearizations"] == one["n_linearizations"]
    if name in SAME_STEPS:
        check_same_steps(found, one)
        return
    losses, expected = found["scores"]["loss"], one["scores"]["loss"]
    if name in TIES:
        assert losses.min() == pytest.approx(expected.min(), rel=0.02)
    else:
        np.testing.assert_allclose(found["penalties"], one["penalties"], rtol=0.15)
    if expected.size:
        np.testing.assert_allclose(losses[:4], expected[:4], rtol=1e-2)
    if not one["penalties"] or np.allclose(found["penalties"], one["penalties"], rtol=1e-6):
        assert found["objective"] == pytest.approx(one["objective"], rel=OBJECTIVE.get(name, 1e-6))
        scale = np.abs(one["predictions"]).max()
        np.testing.assert_allclose(found["predictions"], one["predictions"], atol=1e-4 * scale)


def check_same_steps(found, one):
    """Check all pairs of penalties that were tried, and the model, up to rounding errors."""
    assert found["n_iter"] == one["n_iter"]
    for name, expected in one["scores"].items():
        np.testing.assert_allclose(found["scores"][name], expected, rtol=1e-9, atol=1e-11)
    for name in ("penalties", "objective"):
        np.testing.assert_allclose(found[name], one[name], rtol=1e-9)
    scale = np.abs(one["predictions"]).max()
    np.testing.assert_allclose(found["predictions"], one["predictions"], atol=1e-9 * scale)


@pytest.mark.parametrize("name", FAST)
def test_same_optimum_as_one_process(group, name):
    check_against_one_process(name, [found[name] for found in group])


def test_sums_over_ranks(group):
    for rank, found in enumerate(of["sums"] for of in group):
        assert found["n"] == 2
        assert found["sum"].tolist() == [3, 3, 3]
        assert found["number"] == 2**41 + 1
        assert found["array"].tolist() == [1, 1]
        assert found["gather"] == ["", "x"]
        rows, own = found["rows"]
        assert rows.tolist() == [[0, 1], [0, 1], [2, 3]]
        assert own == (slice(0, 1), slice(1, 3))[rank]
        assert found["first"].tolist() == [0, 1]
        assert found["all"] == [True, False]


def test_a_search_splits_its_folds(group):
    """The scores and the model have the bits of one process."""
    expected, folds = search()
    assert folds == {0, 1, 2}
    assert [found["search"] for found in group] == [(expected, {0, 2}), (expected, {1})]


def test_rank_0_draws_the_network_of_a_search(group):
    assert group[0]["random network"] == group[1]["random network"] == search_random_network(0)


def test_what_travels_does_not_grow_with_the_samples(group):
    for few, many in (found["bytes"] for found in group):
        assert few == many
        gradient, factor = 4 * (4 * 6 * 9 + 6 + 3 * 6 + 3), 4 * (4 * 9 + 1) ** 2
        assert max(few) == factor
        assert few.count(gradient) >= 3


def test_ranks_that_do_different_things_stop(group):
    for rank, (kind, text) in enumerate(found["different"] for found in group):
        assert kind == "RuntimeError"
        assert f"rank {rank} has come to 'sum' (torch.float32, ({2 + rank},))" in text


def test_a_callback_of_one_rank_stops_all(group):
    assert [found["stopped"] for found in group] == [(None, 2), (None, 2)]


def test_only_fits_communicate(group):
    assert group[0]["outside"] == 1
    assert group[0]["alone"].shape == Y.shape


MESSAGES = {
    "raises": (
        "RuntimeError",
        "No rank has a fitted estimator, as rank 1 failed: ValueError: Input X contains NaN",
    ),
    "alpha": ("ValueError", "alpha is 0.1 on rank 0 and 0.2 on rank 1"),
    "store_dtype": ("ValueError", "store_dtype is 'auto' on rank 0 and 'bfloat16' on rank 1"),
    "invalid": (
        "RuntimeError",
        "No rank has a fitted estimator, as rank 1 failed: InvalidParameterError: The 'alpha'",
    ),
    "shape": ("ValueError", r"X.shape[1:] is (1, 8, 8) on rank 0 and (1, 7, 8) on rank 1"),
    "network": ("ValueError", "backbone: the network of rank 1 differs from that of rank 0"),
    "merge": ("ValueError", "with the same parameters, but coef_ is"),
    "warm start, model": ("ValueError", "with the same parameters, but coef_ is"),
    "classes": ("ValueError", "y must have classes of one type on all ranks: rank 0 has <U"),
    "search, half": ("ValueError", "y of rank 1 differs from that of rank 0. The ranks"),
    "search, X": ("ValueError", "X of rank 1 differs from that of rank 0. The ranks"),
    "search, scorer": (
        "RuntimeError",
        "No rank has a fitted estimator, as rank 1 failed: ZeroDivisionError",
    ),
    "search, cv": ("ValueError", "cv of rank 1 differs from that of rank 0. The ranks"),
    "thread": ("RuntimeError", "Another thread of this process is fitting"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_an_error_stops_all_ranks(group, name):
    kind, text = group[0][name]
    assert (kind, text[text.find(MESSAGES[name][1]) :][: len(MESSAGES[name][1])]) == MESSAGES[name]
    assert group[1][name] is not None


def test_a_rank_that_fails_has_its_own_error(group):
    assert group[1]["raises"][0] == "ValueError"


def test_each_rank_has_a_checkpoint_of_its_folds(group):
    expected, _ = search()
    for rank, found in enumerate(of["resumed search"] for of in group):
        killed, files, scores, n_written = found
        assert killed[0] == ("KeyError" if rank else "RuntimeError")
        assert files == ["search", "search.rank1"]
        assert n_written >= 4
        assert scores == expected


def test_a_checkpoint_serves_all_ranks(group):
    for rank, found in enumerate(of["checkpoint"] for of in group):
        assert found["whole"] is None
        assert found["n_written"] == (0 if rank else 8)
        expected = ("RuntimeError", "rank 0 failed: KeyError") if rank else ("KeyError", "killed")
        for name, text in {
            "killed": expected[1],
            "other": "differ in alpha",
            "X of rank 1": "differ in X. ",
            "y of rank 1": "differ in y. ",
        }.items():
            assert found[name] is not None
            assert text in found[name][1]
        assert found["killed"][0] == expected[0]
        assert found["finished"] is None
        assert found["same"]
        assert "checkpoint is 'given' on rank 0 and 'None' on rank 1" in found["some"][1]
    assert group[0]["checkpoint"]["bits"] == group[1]["checkpoint"]["bits"]


def test_the_group_is_usable_after_errors(group):
    assert [found["afterwards"] for found in group] == [None, None]


def test_memory_may_run_out_on_one_rank(group):
    for found in group:
        error, probabilities = found["memory"]
        assert error is None
        np.testing.assert_allclose(probabilities, found["probabilities"], atol=1e-4)


def test_a_killed_rank_is_named(group):
    (kind, text), seconds = group[0]["killed"]
    assert kind == "RuntimeError"
    assert "Rank 1 gives no sign of life: the process has ended" in text
    assert seconds < 60


def absent(rank, size, missing, path, n_joint, ends):
    """One rank fits fewer times than the other, and its process lives on or ends."""
    for _ in range(n_joint):
        assert fit_half(rank, estimator()) is None
    if rank == missing and ends:
        os._exit(0)
    if rank == missing:
        while not (path / f"{1 - rank}.pickle").exists():
            time.sleep(0.05)
        return None
    return fit_half(rank, estimator())


@pytest.mark.parametrize(
    ("missing", "tcp", "n_joint", "ends"),
    [
        (1, False, 0, False),
        pytest.param(0, True, 0, False, marks=pytest.mark.slow),
        pytest.param(1, True, 1, False, marks=pytest.mark.slow),
        pytest.param(1, True, 0, True, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_not_call_fit_is_named(tmp_path, missing, tcp, n_joint, ends):
    given = {"tcp": tcp, "timeout": 30 if n_joint else 5}
    found = ranks.run(2, tmp_path, absent, missing, tmp_path, n_joint, ends, **given)
    kind, text = found[1 - missing]
    assert kind == "RuntimeError"
    assert f"Rank {missing} did not call fit before the timeout of the process group" in text


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_cases(tmp_path, size):
    found = ranks.run(size, tmp_path, all_cases)
    for name in ranks.CASES:
        check_against_one_process(name, [of_rank[name] for of_rank in found])


def all_cases(rank, size):
    return {name: ranks.fit_case(name, rank, size) for name in ranks.CASES}


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 2])
def test_the_others_stop_within_a_minute(tmp_path, lost):
    """The store of the group may be lost, too, with rank 0."""
    found = ranks.run(4, tmp_path, in_the_middle, lost, tcp=True)
    for rank, of_rank in enumerate(found):
        assert (of_rank is None) == (rank == lost)
        if rank != lost:
            kind, text = of_rank
            assert kind == "RuntimeError"
            assert f"ank {lost}" in text


def in_the_middle(rank, size, lost):
    def fit():
        with fit_together():
            for _ in range(3):
                sum_over_ranks(torch.ones(1000))
            if rank == lost:
                os._exit(1)
            for _ in range(3):
                sum_over_ranks(torch.ones(1000))

    return error_of(fit)
