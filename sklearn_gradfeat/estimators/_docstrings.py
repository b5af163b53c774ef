"""Text that the docstrings of several estimators share."""

from __future__ import annotations

import re
import textwrap
from typing import Any, TypeVar

Documented = TypeVar("Documented", bound=Any)

NETWORK = """
backbone : None, str, torch.nn.Module or callable, default=None
    The pretrained network. It is copied and frozen; the original never changes. Clones
    in grid searches share one copy.

    - None: ``"convnet-rotation"`` for images; a wide multi-layer perceptron with random
      weights for tabular data.
    - str: ``"convnet-rotation"`` or ``"convnet-vae"``, small networks for 32 x 32 pixels that
      are part of the package; ``"resnet18"`` or ``"torchvision/resnet18"``, ``"timm/NAME"``:
      pretrained weights with their own input transform, without the classifier.
      ``"hf/NAME"``: an encoder of Hugging Face for images, texts or sounds with its own
      processor or tokenizer; ``"hf//path"`` and ``"hf/./path"`` are folders. With an encoder
      for texts, ``X`` is a list, an array or a column of strings. New texts are cut to the
      number of tokens of the longest text in ``fit``, rounded up to a multiple of 32. With
      one for sounds, ``X`` has the shape (n_samples, n_times).
    - module: its output is the activation, of shape (n_samples, n_features) or
      (n_samples, n_features, ...); see ``activation_layer``.
    - callable: returns a module. It is called once in every fit, under ``random_state``.

gradient_layers : {"last", "after_attention", "all"}, int, str or list of str, default="last"
    The layers whose parameters are θ₂. ``"last"`` is the topmost residual or transformer
    block; in a network without such blocks, the topmost convolution or linear layer.
    ``"after_attention"`` is the part of the last transformer block that follows its
    attention: the output projection and the multi-layer perceptron, without norms. An
    integer k is the k topmost blocks. Any other value holds names or glob patterns of
    submodules or parameters.
activation_layer : "auto", str, int, list of str or None, default="auto"
    The layers whose outputs are the activation.

    - ``"auto"``: the outputs of up to four blocks below the gradient layers, and the output of
      the backbone, or the input of a classifier of ImageNet at its end, unless that is one of
      the gradient layers. Blocks are counted as in ``gradient_layers``.
    - None: the output of the backbone alone.
    - str: the output of one submodule.
    - list of str, or a glob pattern: the outputs of several submodules, side by side from
      bottom to top. The empty name is the backbone itself. A ``*`` also matches dots. A
      pattern leaves out submodules that are not called.
    - int k: the outputs of the k topmost blocks, counted as in ``gradient_layers``, and the
      output of the backbone unless one of them is equal to it, up to rounding, on the first
      two samples. For token ids it is always there.

    The output of a submodule is averaged over all axes but those of samples and channels. The
    channels are on the last axis where the layer ends in a linear layer or a layer norm, as
    in transformers, and on the second axis otherwise. Of a tuple, the first item counts; of
    several calls, the last. Padding is left out where a submodule takes its mask, as
    ``attention_mask``, ``src_key_padding_mask`` or ``key_padding_mask``. Unless it is
    None, one name, or ``"auto"`` with the output of the backbone alone, the output of each
    layer is divided by its root mean square over the training samples, with their weights; an
    output of zeros stays.
preprocess : "auto", callable or None, default="auto"
    A transform of each batch before the network. It takes and returns a tensor with one
    row per sample, on ``device``, or in host memory if the transform fails on the device.
    ``"auto"`` is the transform of a named network, which takes uint8 images or floats in
    [0, 1] of any size, grey or RGB, channels first or last. For any other backbone,
    ``"auto"`` is no transform. ``feature_store`` has an effect only if the transform
    consists of code from installed packages.
negative_slope : float, default=None
    The slope below zero of the ReLUs above the gradient layers, at least 0 and below 1, in
    activation and derivative alike. A plain ReLU has no derivative where its input is
    negative. None leaves the ReLUs as they are.
features : {"full", "activation", "gradient"}, default="full"
    The terms of the model: both, ``W f`` alone, or ``Ω J w₂`` alone.
n_linearizations : int or "auto", default=1
    The number of linear models that are fitted in turn. After each, the parameters θ₂ move to
    its optimum, the output weights are fitted again, and the next model is the linearisation
    there (the prox-linear method [2]_). A penalty on the move grows until the training loss of
    the network plus the penalties falls. Of the last linear model and the network that moved
    once more, the fit returns the one with the smaller loss of held-out samples, if those
    choose ``gradient_alpha``, and otherwise the moved network. ``"auto"`` goes on until the
    loss of held-out samples does not fall any more. With ``gradient_alpha="auto"``, these
    samples choose the number, too, up to a given one, and the first linearisations have
    stronger penalties than the last ones. The CV estimators take numbers alone, and
    ``features="gradient"`` takes 1 alone. One is the model of the paper, the only one that
    is solved to ``tol``; the others are solved more loosely.
parametrization : {"ntk", "standard"}, default="ntk"
    The scale of the displacements ``w₂`` under the penalty. The NTK parametrization divides
    weights by the square root of their number of output channels, and biases by √10.
"""

SOLVER = """
max_iter : int, default=100
    The maximum number of iterations of each of the two fits.
tol : float, default=1e-4
    The solver stops when the Newton decrement ``½ gᵀ P g``, with the gradient ``g`` and the
    preconditioner ``P``, is below ``tol`` times the fall of the objective so far. The decrement
    predicts how far the objective can still fall. The second fit counts from its own start.
"""

WARM_START = """
warm_start : bool, default=False
    Whether to start from the previous solution if its shape fits. The optimum is the same, but
    several linearisations go on from the network that moved. A penalty on ``"auto"`` is chosen
    anew.
"""

CHECKPOINT = """
checkpoint : path, default=None
    A file for the finished results of a fit and the state of the solver, written every
    ``checkpoint_seconds``, see :func:`set_config`. A fit that was killed goes on if ``fit`` is
    called again with the same parameters and data, and ends with the same model. With a path as
    ``feature_store``, the samples in the store do not pass through the frozen layers again. The
    file of another fit is refused. It is removed at the end of the fit. None writes nothing.
"""

COMPUTATION = """
batch_size : int, default=256
    The number of samples that pass through the network at once. It changes results by
    rounding errors only. Where memory runs out, batches are halved, with a warning.
feature_store : "auto", path or None, default="auto"
    Where the output of the frozen layers is kept. The frozen layers then see every sample
    once for all clones, folds, candidates, fits and predictions. ``"auto"`` keeps it in
    memory for as long as the network exists. It keeps nothing for the random network, which
    is faster than a look-up. A path is a directory that processes share, at the same time
    or one after the other; it needs the ``disk`` extra. None keeps nothing between fits.
    :func:`set_config` bounds the size.
store_dtype : {"auto", "bfloat16"}, default="auto"
    The dtype of the output of the frozen layers, in ``feature_store``, in memory and in files.
    ``"auto"`` is the dtype of the gradient layers. ``"bfloat16"`` takes half of the memory of
    float32. It rounds the inputs of the gradient layers, in fits and predictions, by at most
    one part in 256, and the layers still compute in ``precision``. Integers and complex numbers
    are not rounded, nor is anything with ``features="activation"`` or with gradient layers that
    take ``X`` itself, where no such output is kept.
device : str or torch.device, default="auto"
    ``"auto"`` is the first of cuda, mps and cpu that is available.
precision : {"auto", "float64", "float32", "bfloat16"}, default="auto"
    The precision of the network and of the results. ``"auto"`` is float64 for tabular data
    of float64 or integers, and float32 for any other input. ``"bfloat16"`` runs the frozen
    layers under autocast, and the rest in float32. For tabular data the gradient layers and
    the results are always float64, except on mps, which has no float64.
random_state : int, RandomState instance or None, default=None
    Seeds the weights of the random network and of callables. Nothing else is random.
verbose : int, default=0
    Whether to show progress on stderr, one line for each part of the work: the frozen layers,
    unless all samples are stored; the search for penalties; and each fit, with the Newton
    decrement and its value at which the fit stops, see ``tol``.
"""

ALPHA_AUTO = """
``"auto"`` chooses it by the loss of held-out samples, see ``validation_scores_``.
"""

GRADIENT_ALPHA_AUTO = """
Infinity leaves the gradient term out. ``"auto"`` chooses it as above, and leaves the
term out where it does not help.
"""

SEARCH = """
alphas : int or array-like of shape (n_alphas,), default=5
    The values of ``alpha``, the L2 penalty on ``W``; or their number, to start with powers of
    ten from the largest curvature of the loss down.
gradient_alphas : int or array-like of shape (n_gradient_alphas,), default=5
    The same for ``gradient_alpha``, the L2 penalty on ``w₂``. Infinity means no gradient term,
    and is part of the grid if a number is given. Two lists are tried in all combinations. Where
    a number is given, the search is coarse to fine: ``alpha`` without a gradient term, then
    ``gradient_alpha``, then the half powers of ten around the best pair; and it goes on beyond
    an end that is best. It scores close approximations of the models with a gradient term,
    where these are cheaper. With ``features="activation"`` it is ignored.
"""

REFIT = """
refit : bool, default=True
    Whether to fit the model with the best penalties on all samples. Without a refit there
    are scores, and no predictions.
n_jobs : int, default=None
    The number of folds that are fitted at the same time, in threads; -1 is all cores, and None
    is 1 unless :func:`joblib.parallel_config` says otherwise.
"""

SEARCH_ATTRIBUTES = """
best_score_ : float
    The mean score of ``alpha_`` and ``gradient_alpha_`` over the folds: the highest one, the
    first of several.
scores_ : ndarray of shape (n_folds, n_alphas, n_gradient_alphas)
    All scores, NaN for pairs that were not tried. ``cv="loo"`` counts as one fold.
alphas_ : ndarray of shape (n_alphas,)
    The values of ``alpha`` in the order of ``scores_``.
gradient_alphas_ : ndarray of shape (n_gradient_alphas,)
    The values of ``gradient_alpha`` in the order of ``scores_``.
"""

VALIDATION_SCORES = """
validation_scores_ : dict of str to ndarray of shape (n_tried,)
    The penalties that ``"auto"`` tried: the columns ``"alpha"`` and ``"gradient_alpha"``, the
    mean ``"loss"`` of held-out samples, and the ``"standard_error"`` of its difference to the
    smallest one with the same kind of penalty: ``alpha`` without a gradient term, or
    ``gradient_alpha`` with one ``alpha``. The arrays are empty if both penalties are numbers.
    :class:`PenaltyDisplay` draws them.
"""

MODEL_ATTRIBUTES = """
alpha_ : float
    The penalty on ``W``, given or chosen.
gradient_alpha_ : float
    The penalty on ``w₂``, given or chosen; infinite for a model without a gradient term.
coef_ : ndarray of shape (n_outputs, n_features)
    The weights ``W``; zeros if the model has no activation term. A classifier of two
    classes has one output, any other as many as classes or labels.
intercept_ : ndarray of shape (n_outputs,)
    The intercept ``b``.
omega_ : ndarray of shape (n_outputs, n_features)
    The output weights ``Ω``, from the fit to the activations alone.
gradient_coef_ : dict of str to ndarray
    The displacements from the pretrained parameters by parameter, in their shapes and units:
    ``w₂``, and with several linearisations ``linearization_point_ + w₂``.
linearization_point_ : dict of str to ndarray
    The displacements at which the network is linearised; empty for the pretrained parameters.
    It is equal to ``gradient_coef_`` for a network that moved without a linear term.
n_linearizations_ : int
    The number of linear models that were fitted in turn; zero without a gradient term.
activation_layers_ : dict of str to float
    The layers whose averaged outputs are the activation, from bottom to top, and the number
    that multiplies each. The empty name is the output of the backbone.
gradient_layers_ : list of str
    The names of the parameters θ₂. A batch norm is folded into the layer before it: the
    bias of that layer stands for both, and the scale is part of its weight.
sample_shape_ : tuple of int
    The shape of one sample; (2, length) for texts, of token ids and attention mask.
n_features_in_ : int
    The length of the second axis of ``X``.
feature_names_in_ : ndarray of shape (`n_features_in_`,)
    The names of the columns, where ``X`` has names that are all strings.
n_iter_ : int
    The number of iterations of the last fit, or of all linearisations.
n_passes_ : int
    The number of passes over the data of the last fit, or of all linearisations.
objective_path_ : ndarray of shape (`n_iter_` + 1,) or (`n_linearizations_` + 1,)
    The objective at the start and after every iteration. With several linearisations, that of
    the network at the start and after every move; a linear model may have no move. It
    never increases.
"""

REFERENCES = """
.. [1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation Learning,
   ICLR 2020, arXiv:2004.05529.
.. [2] D. Drusvyatskiy, A. S. Lewis, Error bounds, quadratic growth, and linear convergence of
   proximal methods, Mathematics of Operations Research 43, 2018, arXiv:1602.06661.
"""

_TEXTS = {
    "NETWORK": NETWORK,
    "SOLVER": SOLVER,
    "WARM_START": WARM_START,
    "CHECKPOINT": CHECKPOINT,
    "COMPUTATION": COMPUTATION,
    "ALPHA_AUTO": ALPHA_AUTO,
    "GRADIENT_ALPHA_AUTO": GRADIENT_ALPHA_AUTO,
    "SEARCH": SEARCH,
    "REFIT": REFIT,
    "SEARCH_ATTRIBUTES": SEARCH_ATTRIBUTES,
    "VALIDATION_SCORES": VALIDATION_SCORES,
    "MODEL_ATTRIBUTES": MODEL_ATTRIBUTES,
    "REFERENCES": REFERENCES,
}


def with_shared_text(kind: Documented) -> Documented:
    """Decorate a class: replace lines such as ``%NETWORK%`` in its docstring by shared text."""

    def block(line: re.Match[str]) -> str:
        return textwrap.indent(_TEXTS[line[2]].strip(), line[1])

    if kind.__doc__ is not None:  # python -OO drops docstrings
        kind.__doc__ = re.sub(r"^( *)%(\w+)%$", block, kind.__doc__, flags=re.MULTILINE)
    return kind
