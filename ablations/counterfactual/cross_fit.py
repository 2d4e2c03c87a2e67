"""What a token's experts would gain, as far as it can be known from other documents: a regression, so that a reference
made of it knows no token's luck.

The measured gain of a token is what its own target made of it, and an oracle that sees it takes luck for skill. Here
the gains of each fold of documents are predicted by a ridge regression on what is known before the target (see
`gains.features`), fitted on the other folds; its penalty is chosen by how well it predicts one of those from the rest.
An allocation picks the largest of many predictions, and with them what is noise, so how far predictions may part tokens
is chosen too: by what the allocation made of them gains on the other folds.

Legend: N counted tokens, L layers, P features (a constant first), K numbers of experts, F folds, D documents.
"""

import numpy as np

from ablations.counterfactual.allocations import by_gains

FOLDS = 5
# Penalties in units of the features' variance times their number; the last one leaves nothing but the mean curve.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e6)


# Shares of a token's predicted difference from its layer's mean curve.
STRENGTHS = (0.0, 0.1, 0.2, 0.35, 0.6, 1.0)


def cross_fitted_gains(
    feature_NLP: np.ndarray, gain_NLK: np.ndarray, document_N: np.ndarray, ks: np.ndarray, mean: float
) -> np.ndarray:
    """Gains to allocate by, which know nothing of a token but what other documents say of its like; float64 [N, L, K].

    Args:
        feature_NLP: of each token in each layer, without the constant.
        gain_NLK: measured, in nats.
        document_N: document d is in fold d mod F.
        ks: the numbers of experts.
        mean: of the allocation that they are for.
    """
    predicted_NLK = np.stack(
        [predicted_gains(feature_NLP[:, layer], gain_NLK[:, layer], document_N) for layer in range(gain_NLK.shape[1])],
        axis=1,
    )
    fold_N = document_N % FOLDS
    for fold in range(FOLDS):
        here, others = fold_N == fold, fold_N != fold
        strength = _best_strength(predicted_NLK[others], gain_NLK[others], ks, mean)
        curve_LK = predicted_NLK[here].mean(0) if here.any() else 0.0
        predicted_NLK[here] = curve_LK + strength * (predicted_NLK[here] - curve_LK)
    return predicted_NLK


def by_cross_fitted_gains(
    gain_NLK: np.ndarray, ks: np.ndarray, total: int, document_N: np.ndarray, *, greedy: bool = False
) -> np.ndarray:
    """The allocation that `cross_fitted_gains` make, int64 [N, L], with the same mean in each fold: strengths differ
    from fold to fold, so their gains have no common price."""
    fold_N, counts_NL = document_N % FOLDS, np.zeros(gain_NLK.shape[:2], dtype=np.int64)
    before = np.cumsum([0, *(int((fold_N == fold).sum()) for fold in range(FOLDS))])
    for fold, share in enumerate(np.diff(before * total // len(fold_N)).tolist()):
        here = fold_N == fold
        if here.any():
            counts_NL[here] = by_gains(gain_NLK[here], ks, share, greedy=greedy)
    return counts_NL


def _best_strength(predicted_NLK: np.ndarray, gain_NLK: np.ndarray, ks: np.ndarray, mean: float) -> float:
    curve_LK = predicted_NLK.mean(0)
    total = round(mean * predicted_NLK[..., 0].size)
    gained = [
        gain_at(gain_NLK, ks, by_gains(curve_LK + strength * (predicted_NLK - curve_LK), ks, total)).sum()
        for strength in STRENGTHS
    ]
    return STRENGTHS[int(np.argmax(gained))]


def gain_at(gain_NLK: np.ndarray, ks: np.ndarray, counts_NL: np.ndarray) -> np.ndarray:
    """Measured gains of an allocation, layer by layer, linear between the numbers of the grid; [N, L]."""
    upper_NL = np.clip(np.searchsorted(ks, counts_NL), 1, len(ks) - 1)
    share_NL = (counts_NL - ks[upper_NL - 1]) / (ks[upper_NL] - ks[upper_NL - 1])
    below_NL, above_NL = (
        np.take_along_axis(gain_NLK, place_NL[..., None], axis=2)[..., 0] for place_NL in (upper_NL - 1, upper_NL)
    )
    return below_NL * (1 - share_NL) + above_NL * share_NL


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
