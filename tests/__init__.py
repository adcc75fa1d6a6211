"""The tests of kdrl_mcore. A package, so that tests and the ranks they start can share `tests.reference` and `tests.ranks`."""
