"""The loss of a larger model at every step, from a ladder of smaller ones.

Behind the warm-up it is the ratio law times what the ladder's runs of the same tokens per parameter leave over, on
average, at the same share of their training. During the warm-up, which no law here describes, it is a line in
log (loss - E) against log size through the ladder's runs at the same share, corrected for their batches.

Legend: P places in the target's training, R runs of the ladder.
"""

from collections.abc import Sequence

import numpy as np

from ablations.scaling.ratio_law import FROM_TOKENS_PER_PARAMETER, OMEGA, Run, Setting, loss_of, see

# Tokens per parameter over which the trend gives way to the law.
BLEND = (FROM_TOKENS_PER_PARAMETER, FROM_TOKENS_PER_PARAMETER + 1.5)
# In warm-up a batch smaller by a share is as many more steps, each at the same rate; later it is worth `OMEGA` of that.
# This many tokens per parameter lie between.
FORGETTING = 1.0


def predict_run(values_V: np.ndarray, runs: Sequence[Run], target: Setting, tokens_P: np.ndarray) -> np.ndarray:
    """The loss of a target, [P]; NaN during its warm-up where the ladder has no run of its tokens per parameter.

    Args:
        values_V: of the ratio law, fitted to the runs.
    """
    alike = [run for run in runs if run.setting.multiple == target.multiple]
    law_P = loss_of(list(values_V), see(target, tokens_P))
    share_P, per_param_P = tokens_P / target.tokens, tokens_P / target.params
    if alike:
        law_P = law_P * np.exp(np.mean([left_over(values_V, run, share_P) for run in alike], axis=0))
        early_P = trend(alike, target, share_P, float(values_V[0]))
    else:
        early_P = np.full(len(tokens_P), np.nan)
    weight_P = np.clip((per_param_P - BLEND[0]) / (BLEND[1] - BLEND[0]), 0.0, 1.0)
    blended_P = (1 - weight_P) * early_P + weight_P * law_P
    return np.where(np.isnan(early_P) & (weight_P > 0), law_P, np.where(weight_P == 1, law_P, blended_P))


def left_over(values_V: np.ndarray, run: Run, share_P: np.ndarray) -> np.ndarray:
    """Log of loss over law at shares of a run's training, [P]."""
    residual = np.log(run.loss_P / loss_of(list(values_V), see(run.setting, run.tokens_P)))
    return np.interp(share_P, run.tokens_P / run.setting.tokens, residual)


def trend(alike: Sequence[Run], target: Setting, share_P: np.ndarray, constant: float) -> np.ndarray:
    """A line in log (loss - E) against log size at each share of training, through runs that have gone as far, [P].

    Args:
        alike: runs of the target's tokens per parameter, of at least two sizes.
        constant: E.
    """
    log_share_P = np.log(share_P)
    reducible_RP = np.stack(
        [
            # Beyond the first row of a run there is nothing to compare with.
            np.interp(
                log_share_P, np.log(run.tokens_P / run.setting.tokens), np.log(run.loss_P - constant), left=np.nan
            )
            for run in alike
        ]
    )
    per_param_P = share_P * target.multiple * 20
    slope_P = -np.gradient(reducible_RP.mean(0), log_share_P) if len(share_P) > 1 else np.zeros(1)
    # In warm-up the integral of the rate grows with the square of the tokens.
    felt_P = 0.5 * slope_P * np.maximum(OMEGA, np.exp(-np.maximum(per_param_P - 1, 0) / FORGETTING))
    batch_R = np.log([run.setting.batch for run in alike])
    size_R = np.log([run.setting.params for run in alike])
    flat_RP = reducible_RP - batch_R[:, None] * felt_P
    centred_R = size_R - size_R.mean()
    rise_P = centred_R @ flat_RP / (centred_R @ centred_R)
    at_target_P = flat_RP.mean(0) + rise_P * (np.log(target.params) - size_R.mean())
    return constant + np.exp(at_target_P + np.log(target.batch) * felt_P)
