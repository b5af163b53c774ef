"""Bad input gives an error that says what to do, and unusual input works."""

import copy

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from tests.tiny import NET, X, Y, estimator, tiny_net


class Lazy:
    """No more than what it takes to be read batch by batch."""

    def __init__(self, array):
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def __len__(self):
        return len(self._array)

    def __getitem__(self, rows):
        return self._array[rows]


class Items(torch.utils.data.Dataset):
    """A map-style dataset, which need not say where it ends."""

    def __init__(self, item, length=24):
        self._item, self._length = item, length

    def __len__(self):
        return self._length

    def __getitem__(self, row):
        return self._item(row % 24)


class Then(nn.Module):
    """The tiny network followed by a function."""

    def __init__(self, function):
        super().__init__()
        self.net = tiny_net()
        self.function = function

    def forward(self, x):
        return self.function(self.net(x))


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X, Y)


def with_value(value):
    changed = X.copy()
    changed[3, 0, 2, 1] = value
    return changed


# --- X that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (with_value(np.nan), ValueError, "X contains NaN"),
        (with_value(np.inf), ValueError, "X contains infinity"),
        (with_value(-np.inf), ValueError, "X contains infinity"),
        (X.astype(complex), ValueError, "Complex data not supported"),
        (X[:, 0, 0, 0], ValueError, "Expected 2D array, got 1D array"),
        (np.float64(3), ValueError, "Expected 2D array, got scalar array"),
        (X[:0], ValueError, "0 sample"),
        (X[:, :0], ValueError, "0 feature"),
        (X[:, :, :0], ValueError, "0 feature"),
        (X[:, :, :, :0], ValueError, "0 feature"),
        (np.char.add(X.astype(str), "a"), ValueError, "numeric"),
        (np.char.add(X.astype(str), "a").astype(object), ValueError, "could not convert string"),
        (sp.csr_array(X.reshape(24, -1)), TypeError, "Sparse data was passed for X"),
        (sp.csc_matrix(X.reshape(24, -1)), TypeError, "Sparse data was passed for X"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "predict"])
def test_bad_X(fitted, bad, error, match, method):
    if method == "fit":
        with pytest.raises(error, match=match):
            estimator().fit(bad, Y)
    else:  # where the shape is wrong as well, that may be said instead
        with pytest.raises((error, ValueError), match=f"{match}|fitted with samples of shape"):
            fitted.predict(bad)


def test_sparse_array_of_four_dimensions():
    try:
        sparse = sp.coo_array(X)
    except ValueError:
        pytest.skip("this scipy has no sparse arrays of four dimensions")
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        estimator().fit(sparse, Y)


def test_extended_precision():
    # Either works, or the message has to name what to convert.
    try:
        wide = estimator().fit(X.astype(np.longdouble), Y)
    except (TypeError, ValueError) as error:
        assert "X" in str(error)
    else:
        assert np.array_equal(wide.predict(X), estimator().fit(X, Y).predict(X))


def test_not_fitted():
    with pytest.raises(NotFittedError, match="not fitted yet"):
        estimator().predict(X)


@pytest.mark.parametrize("wrap", [np.asarray, Lazy], ids=["array", "lazy"])
@pytest.mark.parametrize(
    "bad", [X[:, :, :7], X.transpose(0, 2, 3, 1), np.repeat(X, 2, 1)], ids=["H", "NHWC", "C"]
)
def test_wrong_sample_shape(fitted, bad, wrap):
    with pytest.raises(ValueError, match=r"samples of shape .* fitted with samples of shape"):
        fitted.predict(wrap(bad))


@pytest.mark.parametrize("bad", [X.reshape(24, -1), X[:, 0], X[..., None]])
def test_wrong_ndim(fitted, bad):
    with pytest.raises(ValueError, match=r"fitted with samples of shape \(1, 8, 8\)"):
        fitted.predict(bad)


def test_wrong_number_of_columns():
    rows = X.reshape(24, -1)[:, :5]
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    model = estimator(net).fit(rows, Y)
    with pytest.raises(ValueError, match=r"X has 4 features, but .* is expecting 5 features"):
        model.predict(rows[:, :4])
    with pytest.raises(ValueError, match=r"fitted with samples of shape \(5,\)"):
        model.predict(X)


# --- y and the weights -----------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [np.asarray, Lazy], ids=["array", "lazy"])
@pytest.mark.parametrize(
    ("y", "match"),
    [
        (Y[:20], "inconsistent numbers of samples"),
        (np.zeros(24, int), "one class"),
        (np.full(24, "a"), "one class"),
        (np.where(Y == 1, np.nan, Y), "NaN"),
        (np.linspace(0, 1, 24), "Unknown label type"),
        (np.stack([Y, Y], 1), "several columns"),
        (None, "y"),
    ],
)
def test_bad_y(y, match, wrap):
    with pytest.raises(ValueError, match=match):
        estimator().fit(wrap(X), y)


def test_column_y():
    with pytest.warns(DataConversionWarning, match="column-vector y"):
        column = estimator().fit(X, Y[:, None])
    assert np.array_equal(column.predict(X), estimator().fit(X, Y).predict(X))


@pytest.mark.parametrize("wrap", [np.asarray, Lazy], ids=["array", "lazy"])
def test_one_sample(wrap):
    with pytest.raises(ValueError, match=r"1 sample|one class"):
        estimator().fit(wrap(X[:1]), Y[:1])


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (np.zeros(24), "(?i)sample.weight.*zero"),
        (np.arange(24) - 1.0, "Negative values in data passed to `sample_weight`"),
        (np.ones(20), "sample_weight.shape"),
        (np.ones((24, 2)), "(?i)sample.weight"),
        (np.full(24, np.nan), "sample_weight contains NaN"),
        (np.full(24, np.inf), "sample_weight contains infinity"),
    ],
)
def test_bad_weights(weights, match):
    with pytest.raises(ValueError, match=match):
        estimator().fit(X, Y, sample_weight=weights)


def test_weights_of_a_class_may_be_zero():
    model = estimator().fit(X, Y, sample_weight=(Y != 1).astype(float))
    assert list(model.classes_) == [0, 1, 2]
    assert not (model.predict(X) == 1).any()


# --- parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -1),
        ("alpha", np.nan),
        ("alpha", np.inf),
        ("gradient_alpha", -1e-3),
        ("tol", -1.0),
        ("features", "both"),
        ("parametrization", "mup"),
        ("precision", "float16"),
        ("device", "tpu"),
        ("device", "cpux:0"),
        ("max_iter", 0),
        ("batch_size", 0),
        ("gradient_layers", 0),
        ("gradient_layers", 1.5),
        ("gradient_layers", []),
        ("gradient_layers", [1]),
        ("activation_layer", 3),
        ("preprocess", "none"),
        ("backbone", 3),
        ("class_weight", "unbalanced"),
        ("random_state", "seed"),
    ],
)
def test_bad_parameter_is_named(name, value):
    # class_weight: the message of scikit-learn quotes the value instead of the name.
    named = f"{name}|{value}" if name == "class_weight" else name
    with pytest.raises((ValueError, TypeError), match=named):
        estimator().set_params(**{name: value}).fit(X, Y)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is present")
def test_device_that_is_not_here():
    with pytest.raises(ValueError, match=r"device='cuda' cannot be used here.*device='auto'"):
        estimator(device="cuda").fit(X, Y)


def test_class_weight_without_a_class():
    with pytest.raises(ValueError, match="class_weight"):
        estimator(class_weight={7: 1.0}).fit(X, Y)


def test_gradient_layers_that_match_nothing():
    with pytest.raises(ValueError, match=r"'2\.wieght' matches no .*nearest names are '2\.weight'"):
        estimator(gradient_layers="2.wieght").fit(X, Y)
    with pytest.raises(ValueError, match=r"'9\.\*' matches no"):
        estimator(gradient_layers=["2.weight", "9.*"]).fit(X, Y)


def test_too_many_blocks():
    with pytest.raises(ValueError, match=r"gradient_layers=3 asks for more blocks .*has: 2"):
        estimator(gradient_layers=3).fit(X, Y)


# --- modules that cannot be used -------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda z: (z, z), TypeError, "must return one tensor, it returned tuple"),
        (lambda z: {"z": z}, TypeError, "must return one tensor, it returned dict"),
        (lambda z: None, TypeError, "must return one tensor, it returned NoneType"),
        (lambda z: z * float("nan"), ValueError, "returned NaN or infinity"),
        (lambda z: z / 0, ValueError, "returned NaN or infinity"),
        (lambda z: z[:1], ValueError, "one row per sample: it was given 2 samples"),
        (lambda z: torch.cat([z, z]), ValueError, r"one row per sample.*shape \(4, 6\)"),
        (lambda z: z.mean(1), ValueError, r"\(n_samples, n_features\).*it returned shape \(2,\)"),
        (lambda z: z.sum(), ValueError, r"\(n_samples, n_features\).*it returned shape \(\)"),
        (lambda z: z.long(), TypeError, "floating point numbers, it returned torch.int64"),
        (lambda z: z @ torch.ones(5, 2), ValueError, r"failed on a batch of shape \(2, 1, 8, 8\)"),
        (lambda z: z.new_ones(z.shape), ValueError, "does not depend on"),
    ],
    ids=["tuple", "dict", "none", "nan", "inf", "first", "twice", "1-D", "0-D", "int", "raises",
         "constant"],
)  # fmt: skip
def test_bad_output_of_the_backbone(function, error, match):
    with pytest.raises(error, match=match):
        estimator(Then(function)).fit(X, Y)


def test_backbone_that_takes_two_arguments():
    with pytest.raises((TypeError, ValueError), match="input2"):
        estimator(nn.Bilinear(8, 8, 2)).fit(X, Y)


def test_samples_that_the_backbone_does_not_take():
    with pytest.raises(
        ValueError, match=r"(?s)failed on a batch of shape \(2, 3, 8, 8\).*preprocess"
    ):
        estimator().fit(np.repeat(X, 3, 1), Y)


def test_batch_norm_without_statistics():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"Layer '1' .*track_running_stats=True"):
        estimator(net).fit(X, Y)


def test_backbone_without_parameters():
    with pytest.raises(ValueError, match="no parameters"):
        estimator(nn.Flatten()).fit(X, Y)
    model = estimator(nn.Flatten(), features="activation").fit(X, Y)
    assert model.coef_.shape == (3, 64)


@pytest.mark.parametrize(
    ("preprocess", "match"),
    [
        (lambda batch: batch[:1], r"one row per sample.*returned \(1, 1, 8, 8\)"),
        (lambda batch: batch.numpy(), "must return a tensor.*returned ndarray"),
    ],
)
def test_bad_preprocess(preprocess, match):
    with pytest.raises(ValueError, match=match):
        estimator(preprocess=preprocess).fit(X, Y)


# --- a failing fit changes nothing -----------------------------------------------------------


def interrupted(batch):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "parameters", "arguments"),
    [
        (ValueError, {}, (with_value(np.nan), Y)),
        (ValueError, {}, (X[:, :, :0], Y)),
        (ValueError, {}, (X.reshape(24, -1), Y)),
        (ValueError, {}, (np.repeat(X, 3, 1), Y)),
        (ValueError, {}, (X, Y[:20])),
        (ValueError, {}, (X, np.zeros(24))),
        (ValueError, {}, (X, Y, np.zeros(24))),
        (ValueError, {}, (Lazy(X[:, :, :5]), np.zeros(24))),
        (ValueError, {}, (Lazy(with_value(np.nan)), Y)),
        (ValueError, {"alpha": -1}, (X, Y)),
        (ValueError, {"gradient_layers": "none"}, (X, Y)),
        (ValueError, {"backbone": Then(lambda z: z / 0)}, (X, Y)),
        (ConvergenceWarning, {"max_iter": 1, "tol": 1e-18}, (X, (Y > 0).astype(int))),
        (KeyboardInterrupt, {"preprocess": interrupted}, (X[:, :, :, :7], Y)),
    ],
)
def test_a_failing_fit_changes_nothing(fitted, error, parameters, arguments):
    model = copy.copy(fitted).set_params(**parameters)
    before = dict(model.__dict__)
    with pytest.raises(error):
        model.fit(*arguments)
    assert set(model.__dict__) == set(before)
    for name, value in before.items():
        assert model.__dict__[name] is value or model.__dict__[name] == value, name
    model.set_params(**{name: getattr(fitted, name) for name in parameters})
    assert np.array_equal(model.predict_proba(X), fitted.predict_proba(X))


def test_a_failing_first_fit_leaves_nothing():
    model = estimator()
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match="one class"):
        model.fit(X, np.zeros(24))
    assert model.__dict__ == before


def test_feature_names_survive_a_failing_fit():
    pd = pytest.importorskip("pandas")
    rows = pd.DataFrame(X.reshape(24, -1)[:, :3], columns=["a", "b", "c"])
    model = estimator(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), features="activation")
    model.fit(rows, Y)
    with pytest.raises(ValueError, match="one class"):
        model.fit(rows.rename(columns={"a": "z"})[["z", "b"]], np.zeros(24))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    assert model.n_features_in_ == 3
    model.predict(rows)


# --- unusual X that works --------------------------------------------------------------------


def memory_map(folder, array):
    np.save(folder / "X.npy", array)
    return np.load(folder / "X.npy", mmap_mode="r")


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: np.ascontiguousarray(a[:, :, ::-1])[:, :, ::-1],
        lambda a: np.ascontiguousarray(a[::-1])[::-1],
        np.asfortranarray,
        lambda a: np.repeat(a, 2, 0)[::2],
        lambda a: a.astype(object),
        lambda a: a.tolist(),
        lambda a: torch.from_numpy(a.copy()),
        lambda a: torch.from_numpy(a.copy()).requires_grad_(),
        Lazy,
    ],
    ids=["big-endian", "negative", "reversed", "fortran", "strided", "object", "list", "tensor",
         "grad", "lazy"],
)  # fmt: skip
def test_layouts(fitted, convert):
    unusual = convert(X)
    assert np.array_equal(fitted.predict_proba(unusual), fitted.predict_proba(X))
    model = estimator().fit(unusual, Y)
    assert np.array_equal(model.coef_, fitted.coef_)
    assert np.array_equal(model.predict_proba(unusual), fitted.predict_proba(X))
    assert model.sample_shape_ == (1, 8, 8)


def test_read_only_memory_map(fitted, tmp_path):
    mapped = memory_map(tmp_path, X)
    before = np.array(mapped)
    model = estimator().fit(mapped, Y)
    assert np.array_equal(model.predict_proba(mapped), fitted.predict_proba(X))
    assert np.array_equal(mapped, before)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64, bool])
def test_integers(dtype):
    integers = np.clip(X * 2 + 3, 0, 8).astype(dtype)
    model = estimator(features="activation").fit(integers, Y)
    other = estimator(features="activation").fit(integers.astype(np.float32), Y)
    assert model.coef_.dtype == np.float32
    assert np.array_equal(model.predict_proba(integers), other.predict_proba(integers))


def test_half_precision(fitted):
    model = estimator().fit(X.astype(np.float16), Y)
    assert model.coef_.dtype == np.float32
    expected = fitted.predict_proba(X)
    np.testing.assert_allclose(model.predict_proba(X.astype(np.float16)), expected, atol=0.02)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_precision(fitted, precision):
    model = estimator(precision=precision).fit(X, Y)
    assert model.coef_.dtype == (np.float64 if precision == "float64" else np.float32)
    atol = 0.05 if precision == "bfloat16" else 1e-3
    np.testing.assert_allclose(model.predict_proba(X), fitted.predict_proba(X), atol=atol)
    assert precision == "float32" or not np.array_equal(model.coef_, fitted.coef_)


def test_bfloat16_tensor(fitted):
    half = torch.from_numpy(X).bfloat16()
    assert np.array_equal(fitted.predict(half), fitted.predict(half.float().numpy()))


def test_tensor_targets(fitted):
    model = estimator().fit(torch.from_numpy(X.copy()), torch.from_numpy(Y.copy()))
    assert np.array_equal(model.predict_proba(X), fitted.predict_proba(X))
    assert isinstance(model.classes_, np.ndarray)


def test_data_frame():
    pd = pytest.importorskip("pandas")
    rows = X.reshape(24, -1)[:, :3].astype(float)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    frame = pd.DataFrame(rows, columns=["a", "b", "c"])
    model = estimator(net).fit(frame, pd.Series(Y, index=np.arange(24)[::-1]))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    assert np.array_equal(model.predict(frame), estimator(net).fit(rows, Y).predict(rows))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["b", "a", "c"]])


def test_rows_of_numbers_compute_in_float64():
    rows = X.reshape(24, -1)[:, :3]
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    for dtype in (np.float64, np.int64, np.float32):
        model = estimator(net, features="activation").fit(rows.astype(dtype), Y)
        assert model.coef_.dtype == np.float64
    assert estimator(features="activation").fit(X, Y).coef_.dtype == np.float32


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_rows_are_predicted_alone_as_in_company(precision):
    rows = X.reshape(24, -1)[:, :3]
    model = GradientFeatureClassifier(precision=precision, random_state=0, alpha=0.1).fit(rows, Y)
    together = model.decision_function(rows)
    alone = np.vstack([model.decision_function(row[None]) for row in rows])
    np.testing.assert_allclose(alone, together, rtol=1e-7, atol=1e-7)


def test_input_is_not_changed():
    images, y, weights = X.copy(), Y.copy(), np.arange(1.0, 25)
    estimator(preprocess=lambda batch: batch.mul_(2)).fit(images, y, weights).predict(images)
    assert np.array_equal(images, X)
    assert np.array_equal(y, Y)
    assert np.array_equal(weights, np.arange(1.0, 25))


# --- lazy X ----------------------------------------------------------------------------------


def test_lazy_is_read_in_batches(fitted):
    class Counting(Lazy):
        largest = 0

        def __getitem__(self, rows):
            part = super().__getitem__(rows)
            Counting.largest = max(Counting.largest, len(part))
            return part

    model = estimator(batch_size=7).fit(Counting(X), Y)
    proba = model.predict_proba(Counting(X))
    assert Counting.largest == 6  # four batches of 24 samples, all of one size
    np.testing.assert_allclose(proba, fitted.predict_proba(X), atol=1e-3)


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda X: torch.from_numpy(X).requires_grad_(),
        lambda X: list(torch.from_numpy(X).requires_grad_()),
        list,
        lambda X: Items(lambda row: X[row]),
        lambda X: Items(lambda row: torch.from_numpy(X[row]).requires_grad_()),
        lambda X: torch.utils.data.Subset(Items(lambda row: X[row]), range(24)),
        Lazy,
    ],
    ids=[
        "tensor",
        "grad",
        "list-of-tensors",
        "list",
        "dataset",
        "tensor-dataset",
        "subset",
        "lazy",
    ],
)
def test_in_a_grid_search(fitted, convert):
    unusual = convert(X.copy())
    grid = GridSearchCV(estimator(), {"alpha": [0.1, 10.0]}, cv=2, error_score="raise")
    search = grid.fit(unusual, Y)
    expected = clone(grid).fit(X, Y).cv_results_["mean_test_score"]
    assert np.array_equal(search.cv_results_["mean_test_score"], expected)
    assert np.array_equal(fitted.predict(unusual), fitted.predict(X))


def test_memory_map_in_a_grid_search(tmp_path):
    grid = GridSearchCV(estimator(), {"alpha": [0.1]}, cv=2, error_score="raise")
    mapped = grid.fit(memory_map(tmp_path, X), Y)
    assert mapped.best_score_ == clone(grid).fit(X, Y).best_score_


def test_dataset_is_read_in_batches(fitted):
    read = []
    dataset = Items(lambda row: read.append(row) or X[row])
    model = estimator(batch_size=7)
    model.fit(dataset, Y)
    assert read == [0, 0, 1, *range(24)]  # the shape, an example, and all
    assert np.array_equal(model.predict(X), fitted.predict(X))


def test_dataset_of_rows():
    rows = X.reshape(24, -1)[:, :3]
    model = estimator(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), features="activation")
    expected = clone(model).fit(rows, Y).coef_
    assert np.array_equal(model.fit(Items(lambda row: rows[row]), Y).coef_, expected)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    ("dataset", "error", "match"),
    [
        (Items(lambda row: (X[row], Y[row])), TypeError, "Item 0 of X is a tuple.*only the inputs"),
        (Items(lambda row: {"image": X[row]}), TypeError, "Item 0 of X is a dict"),
        (Items(lambda row: X[row, :, : 8 - row // 5]), ValueError, r"Item 5 of X .*\(1, 7, 8\)"),
        (Items(lambda row: X[row], 0), ValueError, "0 sample"),
        (Stream(), TypeError, "without a length"),
    ],
)
def test_bad_dataset(dataset, error, match):
    with pytest.raises(error, match=match):
        estimator().fit(dataset, Y[: len(dataset)] if hasattr(dataset, "__len__") else Y)


def test_lazy_nan_at_predict(fitted):
    with pytest.raises(ValueError, match="X contains NaN or infinity"):
        fitted.predict(Lazy(with_value(np.nan)))


def test_lazy_without_samples(fitted):
    with pytest.raises(ValueError, match="0 sample"):
        fitted.predict(Lazy(X[:0]))


def test_lazy_of_strings():
    with pytest.raises((ValueError, TypeError), match="X"):
        estimator().fit(Lazy(X.astype(str)), Y)


def test_lazy_drops_the_names_of_a_former_fit():
    pd = pytest.importorskip("pandas")
    rows = pd.DataFrame(X.reshape(24, -1)[:, :3], columns=["a", "b", "c"])
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model = estimator(net, features="activation").fit(rows, Y)
    model.set_params(backbone=NET).fit(Lazy(X), Y)
    assert not hasattr(model, "feature_names_in_")
    assert model.n_features_in_ == 1


# --- the user's module stays as it is --------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module_is_unchanged(training, dtype):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).to(dtype)  # fmt: skip
    net.train(training)
    net[1].eval()
    net[4].weight.requires_grad_(False)
    net[0].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(net.state_dict())
    objects = {name: id(value) for name, value in net.named_parameters()}
    modes = [layer.training for layer in net.modules()]
    wanted = [p.requires_grad for p in net.parameters()]
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in net.modules()]
    attributes = [set(layer.__dict__) for layer in net.modules()]

    model = estimator(net, precision="float32", activation_layer="4").fit(X, Y)
    model.predict(X)

    assert model.backbone is net
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    assert all(p.device.type == "cpu" for p in net.parameters())
    assert {name: id(value) for name, value in net.named_parameters()} == objects
    assert [layer.training for layer in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == wanted
    assert all(p.grad is None for p in net.parameters())
    assert hooks == [
        len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in net.modules()
    ]
    assert [set(layer.__dict__) for layer in net.modules()] == attributes


def test_global_state_is_unchanged():
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    fast = torch.backends.mha.get_fastpath_enabled()
    estimator(tiny_net, random_state=0).fit(X, Y).predict(X)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    estimator(nn.Flatten, features="activation", random_state=0).fit(X, Y).predict(X)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled() == grad
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_works_where_gradients_are_off(fitted):
    with torch.no_grad():
        model = estimator().fit(X, Y)
        proba = model.predict_proba(X)
    assert np.array_equal(proba, fitted.predict_proba(X))


def test_predicts_the_same_in_inference_mode(fitted):
    expected = fitted.predict_proba(X)
    with torch.inference_mode():
        assert np.array_equal(fitted.predict_proba(X), expected)


def test_fits_the_same_in_inference_mode(fitted):
    net = tiny_net()
    with torch.inference_mode():
        inside = estimator(net).fit(X, Y)
    outside = estimator(net).fit(X, Y)
    assert np.array_equal(outside.coef_, fitted.coef_)
    assert np.array_equal(inside.coef_, fitted.coef_)


@pytest.mark.parametrize("shift", [lambda Y: 2 * Y - 1, lambda Y: 2 * Y, lambda Y: Y + 1])
def test_multilabel_targets_are_zeros_and_ones(shift):
    Y = np.random.RandomState(0).randint(0, 2, (30, 3))
    with pytest.raises(ValueError, match="zeros and ones"):
        GradientFeatureClassifier(random_state=0).fit(
            np.random.RandomState(1).randn(30, 4), shift(Y)
        )


def test_constant_samples_without_information():
    X, y = np.ones((30, 3)), np.arange(30) % 3
    model = GradientFeatureClassifier(random_state=0).fit(X, y)  # no ConvergenceWarning
    np.testing.assert_allclose(model.predict_proba(X), 1 / 3, atol=1e-6)


def test_gradient_features_without_intercept_and_zero_weights_between():
    rng = np.random.RandomState(0)
    X = rng.randn(2200, 3)
    y = (X[:, 0] > 0).astype(int)
    model = GradientFeatureClassifier(
        features="gradient", fit_intercept=False, random_state=0, alpha=0.1, tol=1e-4
    )
    model.fit(X, y, sample_weight=np.tile([0.0, 1.0], 1100))
    assert model.score(X, y) > 0.9


def test_attention_settings_survive_threads():
    import torch

    from sklearn_gradfeat.backbones._attention import differentiable_attention

    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    first, second = differentiable_attention(), differentiable_attention()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    after = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    assert after == before
