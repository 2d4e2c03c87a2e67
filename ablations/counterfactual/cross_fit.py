"""What a token's experts would gain, as far as it can be known from other documents: a regression, so that a reference
made of it knows no token's luck.

The measured gain of a token is what its own target made of it, and an oracle that sees it takes luck for skill. Here
the gains of each fold of documents are predicted by a ridge regression on what is known before the target (see
`gains.Features`), fitted on the other folds; its penalty is chosen by how well it predicts one of those from the rest.

Legend: N counted tokens, P features (a constant first), K numbers of experts, F folds, D documents.
"""

import numpy as np

FOLDS = 5
# Penalties in units of the features' variance times their number; the last one leaves nothing but the mean curve.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e6)


def predicted_gains(feature_NP: np.ndarray, gain_NK: np.ndarray, document_N: np.ndarray) -> np.ndarray:
    """Each token's gains as documents of other folds predict them, float64 [N, K].

    Args:
        feature_NP: without the constant.
        gain_NK: measured, in nats.
        document_N: document d is in fold d mod F.
    """
    fold_N = document_N % FOLDS
    scaled_NP = _standardised(feature_NP)
    whole_NP = np.column_stack([np.ones(len(scaled_NP)), scaled_NP])
    folds = [fold_N == fold for fold in range(FOLDS)]
    squares_FPP = np.stack([whole_NP[here].T @ whole_NP[here] for here in folds])
    products_FPK = np.stack([whole_NP[here].T @ gain_NK[here] for here in folds])
    predicted_NK = np.zeros(gain_NK.shape)
    for fold, here in enumerate(folds):
        if not here.any():
            continue
        others = [other for other in range(FOLDS) if other != fold and folds[other].any()]
        penalty = _best_penalty(squares_FPP[others], products_FPK[others])
        weight_PK = _ridge(squares_FPP[others].sum(0), products_FPK[others].sum(0), penalty)
        predicted_NK[here] = whole_NP[here] @ weight_PK
    return predicted_NK


def _standardised(feature_NP: np.ndarray) -> np.ndarray:
    deviation_P = feature_NP.std(0)
    return (feature_NP - feature_NP.mean(0)) / np.where(deviation_P > 1e-9, deviation_P, 1.0)


def _ridge(squares_PP: np.ndarray, products_PK: np.ndarray, penalty: float) -> np.ndarray:
    """The constant, whose row holds the number of tokens, is not penalised."""
    n_features = len(squares_PP)
    diagonal_P = np.full(n_features, penalty * squares_PP[0, 0])
    diagonal_P[0] = 1e-9
    return np.linalg.solve(squares_PP + np.diag(diagonal_P), products_PK)


def _best_penalty(squares_FPP: np.ndarray, products_FPK: np.ndarray) -> float:
    """By the squared error on each fold of weights from the others; where there are no others, nothing but the mean."""
    if len(squares_FPP) < 2:
        return PENALTIES[-1]
    errors = []
    for penalty in PENALTIES:
        error = 0.0
        for fold in range(len(squares_FPP)):
            others = [other for other in range(len(squares_FPP)) if other != fold]
            weight_PK = _ridge(squares_FPP[others].sum(0), products_FPK[others].sum(0), penalty)
            # The sum of squares of what is predicted is the same for all of them.
            error += float((weight_PK * (squares_FPP[fold] @ weight_PK - 2 * products_FPK[fold])).sum())
        errors.append(error)
    return PENALTIES[int(np.argmin(errors))]
