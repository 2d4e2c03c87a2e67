"""`python -m ablations scaling`: which part of it a command line asks for."""

from ablations.scaling.options import (
    CompareOptions,
    CurvesOptions,
    FitOptions,
    PlanOptions,
    PredictOptions,
    ScalingCommand,
)


def run_scaling(options: ScalingCommand) -> None:
    """Runs one of the commands.

    Raises:
        ValueError: for data or options that cannot be used.
    """
    # Each part imports what only it needs.
    match options:
        case FitOptions():
            from ablations.scaling.fit import fit_command

            fit_command(options)
        case CurvesOptions():
            from ablations.scaling.curves import curves_command

            curves_command(options)
        case PredictOptions():
            from ablations.scaling.predict import predict_command

            predict_command(options)
        case CompareOptions():
            from ablations.scaling.compare import compare_command

            compare_command(options)
        case PlanOptions():
            from ablations.scaling.plan import plan_command

            plan_command(options)
