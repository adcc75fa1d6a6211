"""The tests of kdrl_mcore. A package, so that they and the ranks they start share `tests.reference` and `tests.support`."""
