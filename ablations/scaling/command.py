"""`python -m ablations scaling`: its commands, and which of them a command line asks for."""

from typing import Annotated

import tyro

from ablations.scaling.ladder_options import LadderOptions
from ablations.scaling.noise_options import NoiseOptions
from ablations.scaling.options import (
    CompareOptions,
    CurvesOptions,
    FitOptions,
    FormsOptions,
    PlanOptions,
    PredictOptions,
)
from ablations.scaling.transfer_options import TransferOptions

ScalingCommand = (
    Annotated[FitOptions, tyro.conf.subcommand("fit")]
    | Annotated[FormsOptions, tyro.conf.subcommand("forms")]
    | Annotated[CurvesOptions, tyro.conf.subcommand("curves")]
    | Annotated[PredictOptions, tyro.conf.subcommand("predict")]
    | Annotated[LadderOptions, tyro.conf.subcommand("ladder")]
    | Annotated[CompareOptions, tyro.conf.subcommand("compare")]
    | Annotated[PlanOptions, tyro.conf.subcommand("plan")]
    | Annotated[TransferOptions, tyro.conf.subcommand("transfer")]
    | Annotated[NoiseOptions, tyro.conf.subcommand("noise")]
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
        case FormsOptions():
            from ablations.scaling.compare_forms import forms_command

            forms_command(options)
        case CurvesOptions():
            from ablations.scaling.curves import curves_command

            curves_command(options)
        case PredictOptions():
            from ablations.scaling.predict import predict_command

            predict_command(options)
        case LadderOptions():
            from ablations.scaling.ladder import ladder_command

            ladder_command(options)
        case CompareOptions():
            from ablations.scaling.compare import compare_command

            compare_command(options)
        case PlanOptions():
            from ablations.scaling.plan import plan_command

            plan_command(options)
        case TransferOptions():
            from ablations.scaling.transfer import transfer_command

            transfer_command(options)
        case NoiseOptions():
            from ablations.scaling.noise import noise_command

            noise_command(options)
