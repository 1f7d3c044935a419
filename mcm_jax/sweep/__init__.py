"""Config sweeps: many runs from one command. A sweep file's ``get_hyper`` lists its trials by these functions."""

from mcm_jax.sweep.trials import (
    Choice,
    choice,
    choices,
    log_uniform,
    product,
    search,
    uniform,
    values,
    zipped,
)

__all__ = ["Choice", "choice", "choices", "log_uniform", "product", "search", "uniform", "values", "zipped"]
