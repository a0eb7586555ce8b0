"""One typed config for all stages: files that build on each other, overrides, all mistakes at once."""

from rlhf_fdiv.config.checks import data_needs, differences, dump, load, parse, schema, to_dict
from rlhf_fdiv.config.options import STAGES, RunConfig

__all__ = ["STAGES", "RunConfig", "data_needs", "differences", "dump", "load", "parse", "schema", "to_dict"]
