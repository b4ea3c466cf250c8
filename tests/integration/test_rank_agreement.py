"""I3 is checked while it trains: ranks whose batches would differ stop with the same error before the first of them."""

import pytest
from launch import launch

WHAT_DIFFERS = {
    "seed": "data seed, order of samples",
    "data": "tokens of rows",
    "groups": "assignment of rows to groups, order of samples",
}


@pytest.mark.parametrize("differs", WHAT_DIFFERS)
def test_ranks_that_differ_stop_with_an_error_that_names_what(tmp_path, differs):
    options = {"commonit_metric": "task", "commonit_balance_lengths": False}
    said = launch(
        [{"name": "run", "group_sizes": [9, 9], "options": options, "differs": differs}], tmp_path, 2, fails=True
    )
    error = f"The ranks would train different batches: rank 1 differs from rank 0 in {WHAT_DIFFERS[differs]}."
    assert said.count(f"ValueError: {error}") >= 1, said
    assert not list(tmp_path.glob("run.ids.rank*")), "a batch was trained"
