"""scikit-learn: a logistic regression on the embeddings, tested on pictures that it has not seen.

python docs/examples/sklearn_classifier.py data/embeddings
"""

import sys

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pipeline

dataset = pipeline.open_dataset(sys.argv[1])
embeddings = dataset.to_numpy()  # (N, D) float32
rows = dataset.table(["key", "label", "content_hash"])  # in the same order
labels = np.array(rows.column("label").to_pylist())

# By content, so that copies of one picture are never on both sides.
is_test = np.array([int(content[:8], 16) % 5 == 0 for content in rows.column("content_hash").to_pylist()])
classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
classifier.fit(embeddings[~is_test], labels[~is_test])
accuracy = classifier.score(embeddings[is_test], labels[is_test])
print(f"trained on {(~is_test).sum()} rows, accuracy {accuracy:.3f} on {is_test.sum()} others")
