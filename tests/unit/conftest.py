"""A way to run hypothesis over broken code: no time goes into making the example that fails a small one."""

from hypothesis import Phase, settings

settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), derandomize=True, database=None)
