"""Command-line flags that scripts share, the parser that explains itself, and the checks of their values."""

from options.checks import check_values, is_optimizer
from options.groups import add_data_args, add_model_args, add_resume_args, add_run_args, add_target_args
from options.parser import FLAGS, KeyValues, OneOrMore, Parser, amount, boolean, flag, key_values, new_parser
from options.training_groups import (
    add_augmentation_args,
    add_cnn_args,
    add_dense_training_args,
    add_distillation_args,
    add_ema_args,
    add_optimizer_args,
    add_schedule_args,
    add_tau_arg,
)

__all__ = [
    "FLAGS",
    "KeyValues",
    "OneOrMore",
    "Parser",
    "add_augmentation_args",
    "add_cnn_args",
    "add_data_args",
    "add_dense_training_args",
    "add_distillation_args",
    "add_ema_args",
    "add_model_args",
    "add_optimizer_args",
    "add_resume_args",
    "add_run_args",
    "add_schedule_args",
    "add_target_args",
    "add_tau_arg",
    "amount",
    "boolean",
    "check_values",
    "flag",
    "is_optimizer",
    "key_values",
    "new_parser",
]
