"""A hypothesis profile for mutation tests: no shrinking of failing examples."""

from hypothesis import Phase, settings

settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), derandomize=True, database=None)
