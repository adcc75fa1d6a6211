"""The tests of kdrl_mcore. They are a package so that tests and the ranks they start can import `tests.reference` and
`tests.support`."""
