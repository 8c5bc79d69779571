"""The stored list of models and runs."""

from flaxzoo.configs import catalog


def test_the_catalog_has_every_model_and_run_with_its_size() -> None:
    assert catalog.read() == catalog.compute(), "run `make catalog`"
